"""What the engine collects about layers that share an input: its moments, in one pass over the activations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from quantlab.engine.linears import weight_of
from quantlab.engine.moments import Moments, MomentSums
from quantlab.errors import ModelError

TOKENS_PER_PIECE = 2048  # converted to float32 at a time


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """What is collected for every layer of a run.

    Attributes:
        inputs: "quantized" measures behind the layers quantized so far, "float" in the float model.
        target_alpha: how far the target of a layer makes up for the errors before it: 0 not at all, 1 fully.
        saliency_groups: groups of rows with a Hessian of their own, weighted by saliency; 0 for the plain Hessian.
        fisher: whether the diagonal of the Fisher information is needed.

    Raises:
        ValueError: on construction, if a value is out of range or two do not go together.
    """

    inputs: Literal["quantized", "float"] = "quantized"
    target_alpha: float = 0.0
    saliency_groups: int = 0
    fisher: bool = False

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "float"):
            raise ValueError(f"inputs={self.inputs!r} must be 'quantized' or 'float'")
        if not 0 <= self.target_alpha <= 1:
            raise ValueError(f"target_alpha={self.target_alpha} must be between 0 and 1")
        if self.saliency_groups < 0:
            raise ValueError(f"saliency_groups={self.saliency_groups} must not be negative")
        if self.inputs == "float" and self.target_alpha > 0:
            raise ValueError(
                f"target_alpha={self.target_alpha} makes up for errors in quantized inputs, but inputs='float' "
                "ignores them; set one of the two"
            )

    @property
    def quantized_inputs(self) -> bool:
        """Whether the inputs behind the quantized layers are read."""
        return self.inputs == "quantized"

    @property
    def float_inputs(self) -> bool:
        """Whether the inputs in the float model are read, so that its hidden states must be kept, too."""
        return self.inputs == "float" or self.target_alpha > 0

    @property
    def gradients(self) -> bool:
        """Whether a backward pass over the calibration set is needed."""
        return self.fisher or self.saliency_groups > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """What the backward pass says about some layers, by their full name.

    Attributes:
        fisher: (out_features, in_features) float32 each; see `InputStatistics.fisher`.
        saliency: (row groups, tokens) float32 each, tokens in the order of the calibration set.
    """

    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    saliency: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupStatistics:
    """Everything measured for a group of layers that share their input.

    Attributes:
        moments: by layer, those of each of its row groups (see `row_groups`); layers whose moments are equal hold
            the same object, so that they can be solved together.
        num_tokens: calibration tokens behind the means; 0 if none reached the layers.
        target_alpha: see StatisticsOptions.
        fisher: by layer, (out_features, in_features) float32; empty if not collected.
    """

    moments: Mapping[str, tuple[Moments, ...]]
    num_tokens: int
    target_alpha: float = 0.0
    fisher: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialStatistics:
    """Sums over some batches.

    Attributes:
        num_tokens: that were added.
        sums: by row group, what the Hessian and the drift (or None) are means of; of the former the upper triangle.
    """

    num_tokens: int
    sums: tuple[tuple[Tensor, Tensor | None], ...]


def row_groups(out_features: int, count: int) -> list[slice]:
    """Rows cut into `count` runs of nearly equal length, fewer if there are fewer rows."""
    count = min(count, out_features)
    bounds = [out_features * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def statistics_bytes(in_features: int, num_layers: int, options: StatisticsOptions) -> int:
    """Memory of the moments of a group of `num_layers` layers that share an input."""
    row_group_count = num_layers * options.saliency_groups or 1
    matrices = 2 if options.target_alpha > 0 else 1
    return 4 * in_features**2 * matrices * row_group_count


def require_collectable(options: StatisticsOptions, config: PretrainedConfig, experts: Sequence[str]) -> None:
    """Refuse statistics that a model cannot give, before any weight is read.

    Args:
        options: what is to be collected.
        config: of the model.
        experts: names of its mixtures of experts.

    Raises:
        ModelError: it says which option, and why.
    """
    routed = {"target_alpha": options.target_alpha, "saliency_groups": options.saliency_groups}
    for name, value in routed.items():
        if experts and value:
            raise ModelError(
                f"{experts[0]} is a mixture of experts: its layers receive the tokens that a router sends them, which "
                f"differ between the float and the quantized model, but {name}={value} compares the two token by "
                f"token; use {name}: 0"
            )
    shared = getattr(config.get_text_config(), "num_kv_shared_layers", 0)
    if options.gradients and shared:
        raise ModelError(
            f"{config.model_type}: {shared} blocks take keys and values from other blocks, so that gradients cannot be "
            "passed back one block at a time; use saliency_groups: 0 and a method that needs no Fisher diagonal"
        )


class _AllSeen(Exception):
    """Leaves a forward pass as soon as every input of interest has been seen."""


def capture_inputs(linears: Sequence[nn.Module], forward: Callable[[], object]) -> list[Tensor | None]:
    """What enters each layer in a forward pass, which is left as soon as that is known.

    Args:
        linears: layers, one of each group that shares an input.
        forward: runs the block once.

    Returns:
        (..., in_features) each; None for a layer that was not called, such as an expert without tokens.
    """
    inputs: dict[int, Tensor] = {}

    def note(position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[position] = args[0]
            if len(inputs) == len(linears):
                raise _AllSeen

        return hook

    with ExitStack() as hooks:
        for position, linear in enumerate(linears):
            hooks.callback(linear.register_forward_pre_hook(note(position)).remove)
        with suppress(_AllSeen):
            forward()
    return [inputs.get(position) for position in range(len(linears))]


class StatisticsCollector:
    """Accumulates the statistics of one group of layers with the same input, batch by batch.

    Sums are float32, whatever the dtype of the activations, and their order is that of the batches, so that equal
    batches have equal statistics, bit for bit.

    Args:
        linears: the layers of the group, by full name.
        options: what is collected.
        gradients: of these layers, if `options.gradients`.
        first_token: number in the calibration set of the first token that is added.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        options: StatisticsOptions,
        gradients: Gradients | None = None,
        first_token: int = 0,
    ) -> None:
        self._options = options
        self._first_token = first_token
        self._names = list(linears)
        self._gradients = gradients or Gradients()
        self._num_tokens = 0
        weight = weight_of(linears[self._names[0]])
        self._in_features = weight.shape[1]
        saliencies: list[Tensor | None] = [None]
        if options.saliency_groups:
            saliencies = [row for name in self._names for row in self._gradients.saliency[name]]
        self._sums = [
            MomentSums(self._in_features, weight.device, saliency, with_drift=options.target_alpha > 0)
            for saliency in saliencies
        ]

    def add(self, quantized: Tensor | None, float_inputs: Tensor | None = None) -> None:
        """Add every token of a batch.

        Args:
            quantized: (..., in_features), the inputs behind the quantized layers; not read with `inputs="float"`.
            float_inputs: the inputs in the float model, if `options.float_inputs`. Either is None if no token of
                the batch reached the layers.

        Raises:
            ModelError: a drift is asked for, but the two models did not send the same tokens to the layer.
        """
        inputs = quantized if self._options.quantized_inputs else float_inputs
        reference = float_inputs if self._options.target_alpha > 0 else inputs
        if _shape(inputs) != _shape(reference):
            raise ModelError(
                f"{self._names[0]}: the quantized and the float model send different tokens to this layer, as they do "
                "behind a router, so that there is no drift between them; use target_alpha: 0"
            )
        if inputs is None or reference is None:
            return
        self._require_saliency(self._first_token + self._num_tokens + inputs[..., 0].numel(), at_most=True)
        rows, reference_rows = (tensor.reshape(-1, self._in_features) for tensor in (inputs, reference))
        for start in range(0, len(rows), TOKENS_PER_PIECE):
            piece = rows[start : start + TOKENS_PER_PIECE].float()
            drift = None if reference is inputs else reference_rows[start : start + TOKENS_PER_PIECE].float() - piece
            for sums in self._sums:
                sums.add(piece, drift, self._first_token + self._num_tokens)
            self._num_tokens += len(piece)

    def partial(self) -> "PartialStatistics":
        """The sums so far, for another collector of the same group to absorb."""
        return PartialStatistics(num_tokens=self._num_tokens, sums=tuple(sums.raw() for sums in self._sums))

    def absorb(self, partial: "PartialStatistics") -> None:
        """Add the sums over other batches."""
        self._num_tokens += partial.num_tokens
        for sums, (hessian, drift) in zip(self._sums, partial.sums, strict=True):
            sums.absorb(hessian, drift)

    def finish(self) -> GroupStatistics:
        """The statistics; the collector gives its memory away and cannot be used again.

        Raises:
            ModelError: saliency is asked for, but the layers did not receive every token.
        """
        self._require_saliency(self._num_tokens)
        moments = iter([sums.finish(self._num_tokens) for sums in self._sums])
        if self._options.saliency_groups:
            by_layer = {name: tuple(next(moments) for _ in self._gradients.saliency[name]) for name in self._names}
        else:
            by_layer = dict.fromkeys(self._names, (next(moments),))
        return GroupStatistics(
            moments=by_layer,
            num_tokens=self._num_tokens,
            target_alpha=self._options.target_alpha,
            fisher={name: self._gradients.fisher[name] for name in self._names} if self._options.fisher else {},
        )

    def _require_saliency(self, num_tokens: int, *, at_most: bool = False) -> None:
        if not self._options.saliency_groups:
            return
        expected = self._gradients.saliency[self._names[0]].shape[1]
        if num_tokens > expected or (num_tokens < expected and not at_most):
            raise ModelError(
                f"{self._names[0]}: received {num_tokens} tokens, but saliency is known for {expected}; a layer behind "
                "a router does not receive every token, so that its saliency cannot be told: use saliency_groups: 0"
            )


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
