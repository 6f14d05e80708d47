"""Exports, read back by the programs they are for, or against the published layout."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.api import CodebookSpec, QuantizedLayer, UniformGrid
from quantlab.checkpoint.dense import densify
from quantlab.checkpoint.export import FORMATS, export
from quantlab.checkpoint.export.bitstream import pack_stream
from quantlab.cli.export import _FORMATS
from quantlab.errors import CheckpointError, UsageError
from quantlab.runtime import LutLinear

TOKENS = torch.arange(12).view(2, 6)
CONFIG = LlamaConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, hidden_size=64, intermediate_size=96,
                     bos_token_id=1, eos_token_id=2)  # fmt: skip


def logits_of(model):
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.fixture
def write(write_checkpoint, tmp_path):
    """Writes a checkpoint whose layers are all on uniform grids; returns the model."""

    def make(bits=4, group_size=None, dtype=torch.float32, *, symmetric=False, zero=None, keep=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).eval()
        modules = {}
        for name, linear in list(model.named_modules()):
            if not isinstance(linear, torch.nn.Linear) or name.endswith(("lm_head", *keep)):
                continue
            rows, columns = linear.weight.shape
            groups = columns // (group_size or columns)
            zeros = torch.randint(0, 1 << bits, (rows, groups)).float()
            zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros if zero is None else zeros + zero
            grid = UniformGrid(scale=torch.rand(rows, groups) / 50 + 0.01, zero=zeros, bits=bits)
            codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
            layer = LutLinear.from_layer(
                QuantizedLayer(codes=codes, codebook=grid), CodebookSpec(bits=bits, group_size=group_size), None
            )
            model.set_submodule(name, layer)
            modules[name] = layer.spec
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "tokenizer.json").write_text("{}")
        write_checkpoint(model, modules, tmp_path / "checkpoint", tmp_path / "source", dtype)
        return model

    return make


def dense(model, dtype):
    densify(model, dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "opt"])
def test_a_dequantized_folder_is_bit_equal_to_the_fake_quantized_model(saved, build_model, tmp_path, name, dtype):
    export(saved(name, dtype).folder, "dequantized", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "generation_config.json").is_file()
    model, quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), build_model(name, dtype)
    weights = {key: quantized.get_submodule(key).dequantize().to(dtype) for key in saved(name, dtype).modules}
    for key, weight in weights.items():
        stored = model.get_submodule(key).weight
        assert stored.dtype == dtype
        assert torch.equal(stored.T if name == "gpt2" else stored, weight)
    if name != "gpt2":  # whose layers multiply in another order
        assert torch.equal(logits_of(model), logits_of(dense(quantized, dtype)))


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(4, None, torch.bfloat16), (4, 32, torch.float32), (3, 32, torch.bfloat16), (8, None, torch.float32),
     (2, 32, torch.float16)],
)  # fmt: skip
@pytest.mark.filterwarnings(
    "ignore:You passed `quantization_config`"
)  # which is how transformers is asked to dequantize
def test_compressed_tensors_are_read_back_bit_equal(write, tmp_path, bits, group_size, dtype):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    quantized = write(bits, group_size, dtype)
    export(tmp_path / "checkpoint", "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(logits_of(model), logits_of(dense(quantized, dtype)))


@pytest.mark.parametrize("group_size", [None, 32])
def test_symmetric_compressed_tensors_need_no_argument_to_be_read(write, tmp_path, group_size):
    pytest.importorskip("compressed_tensors")
    quantized = write(4, group_size, symmetric=True)
    export(tmp_path / "checkpoint", "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(model), logits_of(dense(quantized, torch.float32)), rtol=1e-4, atol=1e-5)


def published_gptq_weight(tensors, bits):
    """The weight of a layer by the published layout, entry by entry: (out_features, in_features)."""

    def take(words, index):
        word, offset = divmod(index * bits, 32)
        pair = int(words[word]) & 0xFFFFFFFF
        if offset + bits > 32:
            pair |= (int(words[word + 1]) & 0xFFFFFFFF) << 32
        return pair >> offset & (1 << bits) - 1

    rows, columns = tensors["scales"].shape[1], len(tensors["g_idx"])
    zeros = [[take(line, row) for row in range(rows)] for line in tensors["qzeros"].tolist()]
    weight = torch.empty(rows, columns)
    for row, words in enumerate(tensors["qweight"].T.tolist()):
        for column in range(columns):
            group = int(tensors["g_idx"][column])
            scale = tensors["scales"][group, row].float()
            weight[row, column] = (take(words, column) - zeros[group][row]) * scale
    return weight


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, None), (4, 32), (8, None)])
def test_the_gptq_layout_is_the_published_one(write, tmp_path, bits, group_size):
    quantized = write(bits, group_size)
    export(tmp_path / "checkpoint", "gptq", tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["bits"], section["group_size"]) == ("gptq", bits, group_size or -1)
    assert (section["checkpoint_format"], section["desc_act"], section["sym"]) == ("gptq_v2", False, False)
    name = "model.layers.0.self_attn.k_proj"
    stored = {k: t for shard in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(shard).items()}
    tensors = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    assert tensors["qweight"].shape == (64 * bits // 32, 64)
    assert torch.equal(published_gptq_weight(tensors, bits), quantized.get_submodule(name).dequantize())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 50, 64])
def test_a_stream_of_bits_is_the_number_that_its_codes_spell(bits, count):
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    packed = pack_stream(codes, bits)
    assert packed.dtype == torch.int32
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (index * bits) for index, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words)) == number
        assert len(words) == -(-count * bits // 32)


def test_side_files_travel_with_the_export(write, tmp_path):
    write()
    export(tmp_path / "checkpoint", "dequantized", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_look_up_tables_say_which_formats_cannot_hold_them(saved, tmp_path, target):
    with pytest.raises(UsageError, match=f"{target} holds uniform grids; 2 of 3 layers have look-up tables"):
        export(saved("llama").folder, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("compressed-tensors", {"zero": 0.5}, "stores zeros as codes from 0 to 15; .* has one between"),
        ("gptq", {"zero": -16}, "stores zeros as codes from 0 to 15"),
        ("gptq", {"bits": 5}, r"gptq holds one code width out of \[2, 3, 4, 8\]"),
        ("gptq", {"keep": ("down_proj",)}, "linear layers are all quantized; 1 are not, the first is .*down_proj"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name_and_leaves_nothing(write, tmp_path, target, arguments, message):
    write(**arguments)
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "checkpoint", target, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_an_existing_folder_is_never_written_to(saved, tmp_path):
    with pytest.raises(UsageError, match="exists; choose another with --output-dir"):
        export(saved("llama").folder, "dequantized", tmp_path)


def test_a_side_file_that_leads_out_of_the_checkpoint_is_not_copied(write, tmp_path):
    write()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "checkpoint" / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link that leads out of the folder"):
        export(tmp_path / "checkpoint", "dequantized", tmp_path / "out")


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == _FORMATS
