"""The engine on a device that has a memory of its own does what it does in main memory.

Run by `test_device.py` in a process of its own: PyTorch never forgets a device, and other tests would find it.

The device is made of the CPU, and refuses what a GPU would refuse: its tensors compute what CPU tensors compute, but an
operation that mixes them with tensors of main memory raises. So everything has to be where it belongs.
"""

import json
from contextlib import closing, contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from quantlab import pipeline
from quantlab.api import CodebookSpec
from quantlab.checkpoint.serialize import file_sha256
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine import stream
from quantlab.engine.forward import FloatParts, streamed_logits
from quantlab.engine.journal import Journal
from quantlab.engine.options import EngineOptions
from quantlab.engine.solve import SolveOptions
from quantlab.engine.statistics import StatisticsOptions
from quantlab.engine.stream import StreamRequest, quantize_model
from quantlab.engine.suspend import SuspendingDriver
from quantlab.errors import ResumableError
from quantlab.models import resolve_model
from quantlab.progress import NoProgress
from quantlab.recipe import load_recipe
from quantlab.recipe.layers import assign_methods
from quantlab.registry import configure
from quantlab.skeleton import CPU, load_model

FARAWAY = "faraway:0"
MOVES = {"aten::copy_", "aten::_to_copy"}
TAKES_INDICES_FROM_ELSEWHERE = {"aten::index.Tensor", "aten::index_put_"}

_registered = []


class FarTensor(Tensor):
    """A tensor of the device, with its values in a CPU tensor, `near`."""

    @staticmethod
    def __new__(cls, near):
        far = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FARAWAY,
            requires_grad=near.requires_grad,
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # composite operations arrive whole there
            parts = operation.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return compute(operation, args, kwargs or {})

    def tolist(self):
        return self.near.tolist()


def compute(operation, args, kwargs):
    """Do on the CPU what is asked of the device."""
    name = operation.overloadpacket._qualified_op_name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.dim() > 0]
    if far and strangers and name not in MOVES | TAKES_INDICES_FROM_ELSEWHERE:
        raise RuntimeError(f"{name}: tensors on different devices")
    args, kwargs = tree_map_only(FarTensor, lambda tensor: tensor.near, (args, kwargs))
    target = kwargs.get("device")
    if target is not None:
        kwargs = kwargs | {"device": "cpu"}
    results = operation(*args, **kwargs)
    if name == "aten::_to_copy" and target is not None and torch.device(target).type == "cpu":
        return results
    known = {id(tensor.near): tensor for tensor in far}  # what an operation in place returns is what it was given

    def moved(tensor):
        return known[id(tensor)] if id(tensor) in known else FarTensor(tensor)

    return tree_map_only(Tensor, moved, results)


def register():
    """Make the device known to PyTorch, for the rest of the process."""
    if _registered:
        return
    _setup_privateuseone_for_python_backend("faraway")
    every, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")

    def arange(*bounds, dtype=None, **_):
        return FarTensor(torch.arange(*bounds, dtype=dtype))  # the default resizes an empty tensor

    for overload in ("arange", "arange.start", "arange.start_step"):
        factories.impl(overload, arange, "PrivateUse1")
    _registered.extend((every, factories))


@pytest.fixture(autouse=True)
def same_arithmetic(monkeypatch):
    """The device has no kernels of its own, and breaks attention down into products."""
    register()
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def quantize(source, target, ids, device, stop=lambda: False, method="rtn", layers="", **settings):
    name, _, preset = method.partition("@")
    options = SolveOptions(quantizer=configure(name, preset=preset or None, options={}), spec=CodebookSpec(bits=4))
    engine = EngineOptions(device=torch.device(device), **settings.pop("engine", {}))
    request = StreamRequest(
        source=source,
        calibration_ids=ids,
        dtype=torch.float32,
        options_of=lambda layer: options if layers in layer else None,
        engine=engine,
        **settings,
    )
    target.mkdir(exist_ok=True)
    with Journal.opened(target) as journal:
        writer = CheckpointWriter(target / "model")
        result = quantize_model(request, writer, journal, target / "work", NoProgress(), stop)
    return result, {path.name: file_sha256(path) for path in (target / "model").iterdir()}


def require_same(model_folder, ids, folder, **settings):
    here, files = quantize(model_folder, folder / "here", ids, CPU, **settings)
    there, others = quantize(model_folder, folder / "there", ids, FARAWAY, **settings)
    assert others == files
    assert torch.equal(there.check_logits, here.check_logits)
    assert there.check_logits.device == CPU
    assert there.layers == here.layers


# A tied head, transposed weights, masks that differ between blocks, experts.
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma3", "mixtral"])
def test_models_are_quantized_as_in_main_memory(model_folder, token_ids, tmp_path, architecture):
    require_same(model_folder(architecture), token_ids, tmp_path)


def test_forwards_pause_there_and_finished_blocks_are_replayed(model_folder, token_ids, tmp_path, monkeypatch):
    @contextmanager
    def open_suspending(model, blocks, _, device):
        with closing(SuspendingDriver(model, blocks, device)) as driver:
            yield driver

    monkeypatch.setattr(stream, "open_driver", open_suspending)
    require_same(model_folder("llama"), token_ids, tmp_path)
    with pytest.raises(ResumableError):
        quantize(model_folder("llama"), tmp_path / "run", token_ids, FARAWAY, stop=lambda: True)
    _, files = quantize(model_folder("llama"), tmp_path / "run", token_ids, FARAWAY)
    assert files == {path.name: file_sha256(path) for path in (tmp_path / "here" / "model").iterdir()}


@pytest.mark.parametrize("method", ["gptq", "quantease", "leanquant", "lnq", "ganq@paper"])
def test_methods_work_there(model_folder, token_ids, tmp_path, method):
    require_same(model_folder("llama"), token_ids, tmp_path, method=method, layers=".1.")


@pytest.mark.parametrize(
    ("statistics", "engine"),
    [
        ({"target_alpha": 0.5}, {"activations": "disk"}),
        ({"inputs": "float"}, {"calibration_shards": 2}),
    ],
)
def test_statistics_of_both_models_are_collected_there(model_folder, token_ids, tmp_path, statistics, engine):
    settings = {"statistics": StatisticsOptions(**statistics), "engine": engine, "method": "gptq"}
    require_same(model_folder("llama"), token_ids, tmp_path, **settings)


def test_shared_statistics_come_to_the_device(model_folder, token_ids, tmp_path):
    settings = {"statistics": StatisticsOptions(inputs="float"), "method": "gptq"}
    _, files = quantize(model_folder("llama"), tmp_path / "alone", token_ids, FARAWAY, **settings)
    shared = settings | {"shared_statistics": tmp_path / "statistics"}
    assert quantize(model_folder("llama"), tmp_path / "sharing", token_ids, FARAWAY, **shared)[1] == files


def test_gradients_are_those_of_main_memory_but_for_their_last_digits(model_folder, token_ids, tmp_path):
    gradients = {}
    for device in ("cpu", FARAWAY):
        folder = tmp_path / device
        settings = {"statistics": StatisticsOptions(saliency_groups=2, fisher=True), "gradients": folder / "gradients"}
        quantize(model_folder("llama"), folder, token_ids, device, layers="v_proj", **settings)
        files = sorted((folder / "gradients").glob("*.safetensors"))
        gradients[device] = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert gradients["cpu"].keys() == gradients[FARAWAY].keys() != set()
    for name, expected in gradients["cpu"].items():
        torch.testing.assert_close(gradients[FARAWAY][name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_stopped_run_goes_on_there(model_folder, token_ids, tmp_path, architecture):
    source = model_folder(architecture)
    _, files = quantize(source, tmp_path / "whole", token_ids, FARAWAY)
    answers = iter([False, True])
    with pytest.raises(ResumableError):
        quantize(source, tmp_path / "run", token_ids, FARAWAY, stop=lambda: next(answers))
    assert quantize(source, tmp_path / "run", token_ids, FARAWAY)[1] == files


def test_logits_are_streamed_there(model_folder, token_ids, tmp_path):
    expected = load_model(model_folder("llama"), torch.float32)(input_ids=token_ids, use_cache=False).logits
    parts = FloatParts(model_folder("llama"), torch.float32, torch.device(FARAWAY))
    with streamed_logits(parts, [token_ids], tmp_path / "work") as logits:
        assert torch.equal(logits(0, token_ids).cpu(), expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_is_checked_and_evaluated_there(monkeypatch, tmp_path, streamed):
    values = ["calibration.num_samples=2", "calibration.sequence_length=32", "evaluation.num_windows=2"]
    recipe = load_recipe("rtn_w4", [*values, "evaluation.sequence_length=32"])
    monkeypatch.setattr(pipeline, "must_stream", lambda *_: streamed)
    perplexity = {}
    for device in ("cpu", FARAWAY):
        options = EngineOptions(device=torch.device(device))
        monkeypatch.setattr(pipeline, "engine_options", lambda _, options=options: options)
        assignment, model = assign_methods(recipe), resolve_model("demo")
        folder = pipeline.execute(assignment, model, tmp_path / device, NoProgress(), "test")
        perplexity[device] = json.loads((folder / "eval.json").read_text())["perplexity"]
    assert perplexity["cpu"] == perplexity[FARAWAY]
