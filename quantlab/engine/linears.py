"""The linear layers of a decoder block: which there are, and which of them read the same input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import ModelError

MIN_QUANTIZED_SHARE = 0.9


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block that are quantized, by their name inside the block, in definition order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight in the orientation of `nn.Linear`: (out_features, in_features); a view."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias, (out_features,), or None."""
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    return bias


def require_quantizable(block: nn.Module, name: str) -> None:
    """Refuse a block whose weights are mostly not in linear layers, which would silently stay as they are.

    Raises:
        ModelError: for example fused mixture-of-experts weights.
    """
    total = sum(parameter.numel() for parameter in block.parameters())
    covered = sum(weight_of(linear).numel() for linear in find_linears(block).values())
    if covered < MIN_QUANTIZED_SHARE * total:
        largest = max(block.named_parameters(), key=lambda item: item[1].numel())[0]
        raise ModelError(
            f"{name}: only {covered / total:.0%} of its {total:,} weights are in linear layers (the largest other "
            f"weight is {largest}); fused mixture-of-experts weights are not supported yet"
        )


def group_by_input(linears: dict[str, nn.Module], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the layers that receive the very same input tensor, groups and names in the order of the calls.

    Args:
        linears: layers by name.
        forward: runs the block once.

    Raises:
        ModelError: a layer is not called, so that nothing is known about its inputs.
    """
    inputs: list[Tensor] = []  # kept alive, so that identity is meaningful
    groups: list[list[str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for known, group in zip(inputs, groups, strict=True):
                if known is args[0]:
                    group.append(name)
                    return
            inputs.append(args[0])
            groups.append([name])

        return hook

    handles = [linear.register_forward_pre_hook(note(name)) for name, linear in linears.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    uncalled = set(linears) - {name for group in groups for name in group}
    if uncalled:
        raise ModelError(f"the layers {sorted(uncalled)} are never called in a forward pass of their block")
    return groups


class HessianAccumulator:
    """Accumulates the mean over tokens of x xᵀ in float32, whatever the dtype of the activations.

    Args:
        in_features: length of x.
        device: where to accumulate.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add every token of a batch: (..., in_features)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._sum.addmm_(rows.T, rows)
        self.num_tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """The Hessian: (in_features, in_features) float32."""
        return self._sum / self.num_tokens
