"""The logits of a model that is not in memory: its blocks are loaded one after the other, for all batches at once.

Works for the float model of a folder and for a quantized checkpoint, with the memory of one block.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.checkpoint.contents import read_contents
from quantlab.checkpoint.reader import empty_model
from quantlab.checkpoint.shard import read_shard
from quantlab.engine.chain import Chain
from quantlab.engine.drive import open_driver
from quantlab.engine.profile import Profile
from quantlab.runtime import LutLinear
from quantlab.skeleton import (
    CPU,
    WeightSource,
    align,
    build_skeleton,
    find_blocks,
    place_buffers,
    read_config,
    tie_weights,
    unload,
)

Logits = Callable[[int, Tensor], Tensor]
"""(number of the batch, its ids) to logits (sequences, tokens, vocabulary)."""


class ModelParts(ABC):
    """A model whose parts can be loaded one at a time.

    Attributes:
        model: the module tree.
        blocks: its decoder blocks.
        device: where the model computes.
    """

    model: PreTrainedModel
    device: torch.device
    blocks: list[nn.Module]

    @abstractmethod
    def load_rest(self) -> None:
        """Load everything outside the blocks."""

    @abstractmethod
    def load_block(self, index: int) -> None:
        """Load one block."""

    @abstractmethod
    def unload_block(self, index: int) -> None:
        """Give the memory of one block back."""


class FloatParts(ModelParts):
    """The parts of a float model.

    Args:
        folder: local model folder with safetensors weights.
        dtype: what the model computes in.
        device: where it computes.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.device = device
        self.model = build_skeleton(read_config(folder), dtype)
        self.blocks = list(find_blocks(self.model)[1])
        self._weights = WeightSource(folder, self.model, dtype, device)

    def load_rest(self) -> None:
        """Load everything outside the blocks."""
        self._weights.load_rest()

    def load_block(self, index: int) -> None:
        """Load one block."""
        self._weights.load_block(index)

    def unload_block(self, index: int) -> None:
        """Give the memory of one block back."""
        unload(self.blocks[index])


class CheckpointParts(ModelParts):
    """The parts of a quantized checkpoint, read as strictly as by `quantlab.load`.

    Args:
        folder: of the checkpoint.
        dtype: what the model computes in; None takes that of the checkpoint.
        device: where it computes.

    Raises:
        CheckpointError: it is damaged, or does not fit the model.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device = CPU) -> None:
        self.device = device
        self._contents = read_contents(folder)
        self.model = empty_model(self._contents, dtype)
        self.model.eval()
        place_buffers(self.model, device)
        self._prefix, blocks = find_blocks(self.model)
        self.blocks = list(blocks)

    def load_rest(self) -> None:
        """Load everything outside the blocks."""
        self._load(lambda name: not name.startswith(f"{self._prefix}."))
        tie_weights(self.model, {name for name, tensor in self.model.state_dict().items() if tensor.is_meta})
        align(self.model)

    def load_block(self, index: int) -> None:
        """Load one block."""
        self._load(lambda name: name.startswith(f"{self._prefix}.{index}."))
        align(self.blocks[index])

    def unload_block(self, index: int) -> None:
        """Give the memory of one block back."""
        block = self.blocks[index]
        for name, layer in list(block.named_modules()):
            if isinstance(layer, LutLinear):
                dtype = torch.float32 if layer.bias is None else layer.bias.dtype
                block.set_submodule(name, LutLinear.empty(layer.spec, bias_dtype=dtype))
        unload(block)

    def _load(self, wanted: Callable[[str], bool]) -> None:
        placeholders = self.model.state_dict()
        for shard, entries in self._contents.shards.items():
            if any(map(wanted, entries)):
                tensors = read_shard(self._contents, shard, placeholders)
                chosen = {name: tensor.to(self.device) for name, tensor in tensors.items() if wanted(name)}
                self.model.load_state_dict(chosen, strict=False, assign=True)


@contextmanager
def streamed_logits(
    parts: ModelParts, batches: Sequence[Tensor], work: Path, advance: Callable[[], None] = lambda: None
) -> Iterator[Logits]:
    """Run batches through a model block by block; inside, their logits can be asked for.

    Args:
        parts: the model.
        batches: token ids, (sequences, tokens) each.
        work: folder for the hidden states behind the last block; removed on leaving.
        advance: called after every block.

    Raises:
        ModelError: the model cannot be streamed.
        NumericalError: a block's output is not finite.
    """
    with ExitStack() as opened:
        with torch.no_grad():  # not inference mode: the driver watches the version of what it passes on
            parts.load_rest()
            parts.load_block(0)
            driver = opened.enter_context(open_driver(parts.model, parts.blocks, batches[0][:1], parts.device))
            chain = Chain(driver, batches, work, in_memory=False, profile=Profile())
            opened.callback(chain.remove)
            for index in range(len(parts.blocks)):
                if index > 0:
                    parts.load_block(index)
                chain.propagate(index, f"block {index}").remove()
                parts.unload_block(index)
                advance()
        yield lambda batch, _: chain.finish(batch)
