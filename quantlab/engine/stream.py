"""The layer-streaming loop: for each decoder block load, calibrate, solve, propagate, write, unload.

Statistics come from the quantized prefix: the inputs of a layer are computed by the quantized blocks before it
and the layers already quantized inside its own block, so that later layers can make up for earlier errors.

A block is finished when the journal says so, and the journal says so when its shard and the hidden states behind
it are on disk. A new process with the same journal goes on behind the last finished block.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.engine.activations import Activations
from quantlab.engine.block import BlockJob, quantize_block
from quantlab.engine.calls import BlockDriver
from quantlab.engine.chain import CHECKED_BATCH, Chain
from quantlab.engine.collect import Place
from quantlab.engine.drive import open_driver
from quantlab.engine.finished import BLOCK, REST, FinishedBlock
from quantlab.engine.gradients import collect_gradients, read_gradients
from quantlab.engine.journal import Journal
from quantlab.engine.linears import bias_of, find_linears
from quantlab.engine.measure import LayerResult
from quantlab.engine.memory import MemoryPlan, give_freed_memory_back, plan_memory
from quantlab.engine.options import EngineOptions, OptionsOf
from quantlab.engine.prefetch import Prefetch
from quantlab.engine.profile import Profile
from quantlab.engine.recall import Recall
from quantlab.engine.replica import ShardSite
from quantlab.engine.shards import Collect, LocalShards, RemoteShards, Shards, shard_ranges
from quantlab.engine.shared import FloatPass, StoredStatistics, collect_in_float_model
from quantlab.engine.statistics import Gradients, StatisticsOptions, require_collectable
from quantlab.engine.survey import survey_model
from quantlab.errors import CheckpointError, RecipeError, ResumableError
from quantlab.executors import Executor, LocalExecutor
from quantlab.experts import fused_experts, unfuse
from quantlab.progress import Progress
from quantlab.runtime import LutLinear, ModuleSpec, storage_layout
from quantlab.skeleton import CPU, WeightSource, build_skeleton, find_blocks, read_config, unload

QUANTIZED, FLOAT = "quantized", "float"

RECALLED_BYTES = 1 << 30
"""Without a memory budget, answers of a block's parts are kept if the hidden states are no larger than this."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamRequest:
    """What the engine is asked to do.

    Attributes:
        source: local model folder with safetensors weights.
        calibration_ids: (samples, tokens) token ids.
        dtype: what the model computes in.
        options_of: the options of every layer.
        statistics: what is collected for every layer.
        engine: how the machine is used.
        gradients: folder for what the backward pass of the float model says, shared by runs of the same model, text,
            dtype and statistics; None keeps it with the run.
        shared_statistics: folder for the statistics of the float model's inputs, shared by runs of the same model,
            text, dtype, statistics, layers to quantize, batches and shards; None collects them block by block and
            keeps none.
    """

    source: Path
    calibration_ids: Tensor
    dtype: torch.dtype
    options_of: OptionsOf
    statistics: StatisticsOptions = field(default_factory=StatisticsOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    gradients: Path | None = None
    shared_statistics: Path | None = None

    def __post_init__(self) -> None:
        if self.shared_statistics is not None and self.statistics.inputs != "float":
            raise ValueError('statistics behind quantized layers are those of one run: only inputs="float" shares them')


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamResult:
    """What the engine leaves behind besides the written shards.

    Attributes:
        layers: one entry per quantized layer, in the order of solving.
        modules: how each quantized module is stored, by its name in the model.
        unfused_experts: names of the modules whose fused experts became one layer each.
        check_ids: (sequences, tokens) of calibration text.
        check_logits: what the quantized model answers to them; a reloaded checkpoint must answer the same.
        drive_mode: how the blocks were driven, "record" or "suspend".
        seconds: where the time went, over all processes that worked on the run.
        borrowed_s: of this time, what a run before spent on the float model that this one took over.
        memory: how the work was cut, and the memory that this was expected to take.
    """

    layers: tuple[LayerResult, ...]
    modules: dict[str, ModuleSpec]
    unfused_experts: tuple[str, ...]
    check_ids: Tensor
    check_logits: Tensor
    drive_mode: str
    seconds: dict[str, float]
    borrowed_s: float
    memory: MemoryPlan


@torch.no_grad()
def quantize_model(
    request: StreamRequest,
    writer: CheckpointWriter,
    journal: Journal,
    work: Path,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    executor: Executor | None = None,
) -> StreamResult:
    """Quantize the linear layers inside the decoder blocks of a causal LM.

    Embeddings, norms and the output head keep their weights.

    Args:
        request: the model and what to do with it.
        writer: receives one shard per block and one for the rest.
        journal: what is finished already; every finished block is added.
        work: folder for hidden states; to be removed when the run is complete.
        progress: is told about every finished layer.
        stop: asked after every block, also of passes through the float model; a true answer ends the run there.
        executor: where layers are solved; None for this process.

    Raises:
        ModelError: the model cannot be streamed.
        RecipeError: a memory budget is too small, or the executor does not go with the device.
        PluginError: the method broke its contract.
        QualityError: the method departed from its options, and may not.
        NumericalError: a layer cannot be solved.
        CheckpointError: what a former process finished is missing or has changed.
        ResumableError: the run was stopped, or the disk is full.
    """
    stream = _Stream(request, writer, journal, work, progress, stop, executor or LocalExecutor())
    with stream.driven():
        while not stream.complete:
            stream.process_block()
            if stop():
                raise ResumableError(f"stopped after {stream.position}")
        return stream.finish()


class _Stream:
    """One model on its way through the engine."""

    _driver: BlockDriver[Any]
    _chains: dict[str, Chain]
    _shards: Shards
    _collect: Collect

    def __init__(
        self,
        request: StreamRequest,
        writer: CheckpointWriter,
        journal: Journal,
        work: Path,
        progress: Progress,
        stop: Callable[[], bool],
        executor: Executor,
    ) -> None:
        self._request, self._writer, self._journal = request, writer, journal
        self._work, self._progress, self._stop, self._executor = work, progress, stop, executor
        self._gradients_folder = request.gradients or work / "gradients"
        self._borrowed_s = 0.0
        self._profile = Profile(request.engine.device)
        if executor.remote and request.engine.on_device:
            raise RecipeError(
                f"engine.device={request.engine.device} is for runs in one process; on the nodes of a cluster, "
                "--gpus-per-task has layers solved on GPUs"
            )
        if request.engine.memory_budget_bytes is not None:
            give_freed_memory_back()
        config = read_config(request.source)
        self._survey = survey_model(config, request.dtype)
        options = {layer: request.options_of(layer) for layer in self._survey.layers}
        self._options = {layer: chosen for layer, chosen in options.items() if chosen is not None}
        self._statistics = request.statistics
        require_collectable(self._statistics, config, self._survey.unfused_experts)
        self._memory = self._plan_memory(outside_stays=False)
        self._batches = request.calibration_ids.split(self._memory.tokens_per_batch // request.calibration_ids.shape[1])
        self._storage_dtype = _narrower(request.dtype, getattr(config, "dtype", None))
        with self._profile.timed("load"):
            self._model = build_skeleton(config, request.dtype)
            self._prefix, blocks = find_blocks(self._model)
            self._blocks: list[nn.Module] = list(blocks)
            self._weights = WeightSource(request.source, self._model, request.dtype, request.engine.device)
        self._done = [FinishedBlock.from_entry(entry) for entry in journal.of_kind(BLOCK)]

    @property
    def complete(self) -> bool:
        """Whether every block is finished."""
        return len(self._done) == len(self._blocks)

    @property
    def position(self) -> str:
        """The last finished block, for people."""
        return f"block {len(self._done)} of {len(self._blocks)}"

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Inside, the batches stand before the first block that is not finished."""
        self._collect_gradients()
        stored = self._collect_statistics()
        with self._profile.timed("load"):
            self._weights.load_rest()
            self._load_block(0)
        self._keep_rest()
        with open_driver(self._model, self._blocks, self._batches[0][:1], self._request.engine.device) as driver:
            self._driver = driver
            if driver.mode == "suspend":
                self._memory = self._plan_memory(outside_stays=True)
            self._progress.begin("quantizing", len(self._options), "layers")
            self._shards = self._open_shards(stored is not None)
            self._collect = self._shards.collect if stored is None else stored.collect
            if self._done:
                self._resume()
            if driver.mode == "record":
                self._weights.unload_rest()
            yield

    def process_block(self) -> None:
        """Quantize, write and leave the next block."""
        index = len(self._done)
        block = self._blocks[index]
        if index > 0:
            self._load_block(index)
        originals = find_linears(block)
        place = self._place(index, originals)
        recall = self._chains[QUANTIZED].recall = self._new_recall(index, originals)
        job = BlockJob(
            place=place,
            shards=self._shards,
            collect=self._collect,
            options=self._options,
            statistics_bytes=self._memory.statistics_bytes,
            max_rows=self._memory.max_rows,
            executor=self._executor,
        )
        results = []
        with self._prefetching(index + 1):
            for result in quantize_block(job):
                results.append(result)
                self._progress.advance(detail=_describe(result, index, len(self._blocks)))
            if recall is not None:
                recall.begin_last_pass()
            passed = self._shards.propagate(place)
            self._chains[QUANTIZED].recall = None
        self._commit(index, results)
        with self._profile.timed("write"):
            for hidden in passed:
                hidden.remove()
        self._leave_block(block, originals)

    def finish(self) -> StreamResult:
        """What is left to say when every block is finished."""
        if self._driver.mode == "record":
            with self._profile.timed("load"):
                self._weights.load_rest()
        with self._profile.timed("forward"):
            logits = self._chains[QUANTIZED].finish(CHECKED_BATCH)
        seconds = Counter(self._profile.take())
        for entry in self._journal.of_kind(BLOCK):
            seconds.update(entry["seconds"])
        return StreamResult(
            layers=tuple(layer for block in self._done for layer in block.layers),
            modules={name: spec for block in self._done for name, spec in block.modules.items()},
            unfused_experts=self._survey.unfused_experts,
            check_ids=self._batches[CHECKED_BATCH],
            check_logits=logits.to(CPU),
            drive_mode=self._driver.mode,
            seconds={part: round(value, 3) for part, value in seconds.items()},
            borrowed_s=round(self._borrowed_s, 3),
            memory=self._memory,
        )

    def _plan_memory(self, *, outside_stays: bool) -> MemoryPlan:
        samples, tokens = self._request.calibration_ids.shape
        return plan_memory(
            self._survey.sizes,
            samples,
            tokens,
            self._request.engine,
            self._statistics,
            calibrated=any(options.quantizer.info.needs for options in self._options.values()),
            outside_stays=outside_stays,
        )

    def _collect_gradients(self) -> None:
        if not self._statistics.gradients:
            return
        request = self._request
        self._borrow(
            lambda: collect_gradients(
                request.source,
                request.calibration_ids,
                request.dtype,
                self._statistics,
                self._gradients_folder,
                # All blocks' inputs exist at once, far more than the budget or the memory was planned for.
                lambda name: Activations(self._work / "backward" / name, in_memory=False, device=request.engine.device),
                self._progress,
                self._stop,
                request.engine.device,
            )
        )

    def _collect_statistics(self) -> StoredStatistics | None:
        """The statistics that runs share, if this one does."""
        request, folder = self._request, self._request.shared_statistics
        if folder is None:
            return None
        asked = FloatPass(
            source=request.source,
            batches=self._batches,
            ranges=shard_ranges(len(self._batches), request.engine.calibration_shards),
            dtype=request.dtype,
            layers=self._options.keys(),
            statistics=self._statistics,
            statistics_bytes=self._memory.statistics_bytes,
            gradients=self._gradients_folder,
            work=self._work / "float pass",
            in_memory=self._memory.activations_in_memory,
            device=request.engine.device,
        )
        self._borrow(lambda: collect_in_float_model(asked, folder, self._progress, self._stop))
        return StoredStatistics(folder, request.engine.device)

    def _borrow(self, collect: Callable[[], float]) -> None:
        """Collect something, or find it collected by another run; either way its seconds count for this one."""
        started = time.monotonic()
        with self._profile.timed("statistics"):
            seconds = collect()
        if not self._done:  # otherwise the journal counts it already
            borrowed_s = max(0.0, seconds - (time.monotonic() - started))
            self._profile.seconds["statistics"] += borrowed_s
            self._borrowed_s += borrowed_s

    def _gradients(self, index: int, originals: Mapping[str, nn.Module]) -> Gradients | None:
        if not self._statistics.gradients:
            return None
        return read_gradients(self._gradients_folder, index, [f"{self._name(index)}.{layer}" for layer in originals])

    def _keep_rest(self) -> None:
        """Write the weights outside the blocks, or take over what a former process wrote."""
        with self._profile.timed("write"):
            for entry in self._journal.of_kind(REST):
                self._writer.restore_shard(entry["shard"], entry["sha256"])
                return
            tensors = _tensors_outside(self._model, self._prefix)
            shard, digest = self._writer.add_shard("rest", tensors, narrow_to=self._storage_dtype)
            self._journal.append({"kind": REST, "shard": shard, "sha256": digest})

    def _open_shards(self, collected: bool) -> Shards:
        """The batches before the first block, here or on the machines of the executor.

        Args:
            collected: whether the statistics are known, so that only the batch of the final check has to come along.
        """
        ranges = shard_ranges(len(self._batches), self._request.engine.calibration_shards)
        remote = self._executor.remote and len(ranges) > 1 and not collected
        if remote and self._driver.replay_on_resume:
            remote = False
            self._progress.advance(0, "calibration stays on this machine: blocks hand on more than hidden states")
        names = [QUANTIZED, FLOAT] if self._statistics.float_inputs and not collected else [QUANTIZED]
        self._chains = {
            name: Chain(
                self._driver,
                self._batches[:1] if remote or collected else self._batches,
                self._work / name,
                in_memory=self._memory.activations_in_memory and not remote,
                profile=self._profile,
                numbers=range(1) if remote else None,
                begin=not remote,
                resumable=True,
                finishing=CHECKED_BATCH,
            )
            for name in names
        }
        if not remote:
            return LocalShards(self._chains, self._batches, ranges)
        shards = RemoteShards(self._executor, [self._site(numbers) for numbers in ranges], self._chains)
        if not self._done:
            shards.start()
        return shards

    def _site(self, numbers: range) -> ShardSite:
        return ShardSite(
            key=uuid.uuid4().hex,
            source=self._request.source.absolute(),
            dtype=self._request.dtype,
            batches=tuple(self._batches[numbers.start : numbers.stop]),
            numbers=numbers,
            first_token=sum(ids.numel() for ids in self._batches[: numbers.start]),
            probe=self._batches[0][:1],
            chains=tuple(self._chains),
            work=self._work.absolute(),
            gradients=self._gradients_folder.absolute(),
            statistics=self._statistics,
            in_memory=self._memory.activations_in_memory,
        )

    def _resume(self) -> None:
        """Go behind the blocks that a former process finished."""
        if self._done[-1].hidden.keys() != self._chains.keys():
            raise CheckpointError(
                f"{self._work.parent}: the run was begun in a comparison, where runs share the statistics of the float "
                "model, and can be continued only there (or the other way round); repeat its command, or remove the "
                "folder to start anew"
            )
        for finished in self._done:
            self._writer.restore_shard(finished.shard, finished.sha256)
        if self._driver.replay_on_resume:
            for index, finished in enumerate(self._done):
                self._replay(index, finished)
        else:
            unload(self._blocks[0])
        self._shards.continue_from(len(self._done), self._done[-1].hidden)
        layers = sum(len(finished.layers) for finished in self._done)
        self._progress.advance(layers, f"continuing after {self.position}, finished before")

    def _replay(self, index: int, finished: FinishedBlock) -> None:
        """Run the batches through a finished block, since it hands more to later blocks than hidden states."""
        block, name = self._blocks[index], self._name(index)
        if index > 0:
            self._load_block(index)
        originals = find_linears(block)
        tensors = load_file(self._writer.path(finished.shard))
        for layer, spec in finished.modules.items():
            stored = {key: tensors[f"{layer}.{key}"].to(self._request.engine.device) for key in storage_layout(spec)}
            linear = originals[layer.removeprefix(f"{name}.")]
            self._model.set_submodule(layer, LutLinear(spec, stored, bias_of(linear)))
        for hidden in self._shards.propagate(self._place(index, originals)):
            hidden.remove()
        self._leave_block(block, originals)

    def _place(self, index: int, originals: Mapping[str, nn.Module]) -> Place:
        return Place(
            index=index,
            name=self._name(index),
            block=self._blocks[index],
            originals=originals,
            statistics=self._statistics,
            gradients=self._gradients(index, originals),
            quantized=self._chains[QUANTIZED],
            float_chain=self._chains.get(FLOAT),
            profile=self._profile,
        )

    def _new_recall(self, index: int, originals: Mapping[str, nn.Module]) -> Recall | None:
        """Where parts of the block do nothing but answer, and the memory for their answers is not spoken for."""
        sizes = self._survey.sizes
        hidden_bytes = self._request.calibration_ids.numel() * sizes.hidden_size * sizes.itemsize
        unbounded = self._request.engine.working_budget_bytes is None and self._memory.activations_in_memory
        if self._executor.remote or self._driver.mode != "record" or self._driver.replay_on_resume:
            return None
        if not unbounded or hidden_bytes > RECALLED_BYTES:
            return None
        return Recall(
            self._blocks[index], [layer for layer in originals if f"{self._name(index)}.{layer}" in self._options]
        )

    def _commit(self, index: int, results: list[LayerResult]) -> None:
        """Write the block, and note in the journal that it is finished."""
        block, name = self._blocks[index], self._name(index)
        with self._profile.timed("write"):
            tensors = {f"{name}.{key}": tensor for key, tensor in block.state_dict().items()}
            shard, digest = self._writer.add_shard(f"block-{index:05d}", tensors, narrow_to=self._storage_dtype)
        finished = FinishedBlock(
            shard=shard,
            sha256=digest,
            layers=tuple(results),
            modules={result.name: self._model.get_submodule(result.name).spec for result in results},  # type: ignore[misc]
            hidden=self._shards.hashes(),
            seconds=self._profile.take(),
        )
        self._journal.append(finished.to_entry())
        self._done.append(finished)

    def _load_block(self, index: int) -> None:
        with self._profile.timed("load"):
            self._weights.load_block(index)
            unfuse(self._blocks[index], fused_experts(self._blocks[index]))

    def _leave_block(self, block: nn.Module, originals: Mapping[str, nn.Module]) -> None:
        for layer, linear in originals.items():
            block.set_submodule(layer, linear)
        unload(block)

    def _prefetching(self, index: int) -> AbstractContextManager[object]:
        return Prefetch(self._weights.block_tensors(index)) if index < len(self._blocks) else nullcontext()

    def _name(self, index: int) -> str:
        return f"{self._prefix}.{index}"


def _tensors_outside(model: PreTrainedModel, prefix: str) -> dict[str, Tensor]:
    """State outside the blocks; of tied weights only the one that the others are tied to."""
    state = model.state_dict()
    tied = {
        target
        for target, source in model.all_tied_weights_keys.items()
        if state[target].data_ptr() == state[source].data_ptr()
    }
    return {name: tensor for name, tensor in state.items() if name not in tied and not name.startswith(prefix + ".")}


def _narrower(compute: torch.dtype, stored: torch.dtype | None) -> torch.dtype:
    """The dtype for weights that are kept: that of the source if the computation did not narrow it."""
    return stored if stored is not None and stored.itemsize < compute.itemsize else compute


def _describe(result: LayerResult, index: int, num_blocks: int) -> str:
    layer = result.name.partition(f".{index}.")[2]
    return (
        f"block {index + 1}/{num_blocks}  {layer}  loss {result.relative_loss:.2e} (RTN {result.rtn_relative_loss:.2e})"
    )
