"""The linear layers of a decoder block: which there are, and which of them read the same input."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import ModelError
from quantlab.experts import expert_groups, fused_experts

MIN_QUANTIZED_SHARE = 0.9
# Time steps of state-space layers and weights of sparse-attention indexers, which models read without calling them,
# and a router that is called twice in a block.
KEPT_NAMES = frozenset({"dt_proj", "weights_proj", "modality_router"})
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block that are quantized, by their name inside the block, in definition order.

    Routers stay as they are: they are small, and a token that goes to the wrong expert is lost altogether. So do
    classes derived from `nn.Linear` that compute something else.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and name.rpartition(".")[2] not in KEPT_NAMES
        and not _is_router(block, name)
    }


def _is_router(block: nn.Module, name: str) -> bool:
    """Whether a layer decides beside a set of experts how much of what they compute is used."""
    parts = name.split(".")
    return any(
        part in ROUTER_NAMES and hasattr(block.get_submodule(".".join(parts[:depth])), "experts")
        for depth, part in enumerate(parts)
    )


def weight_of(linear: nn.Module) -> Tensor:
    """The weight in the orientation of `nn.Linear`: (out_features, in_features); a view."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias, (out_features,), or None."""
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    return bias


def require_quantizable(block: nn.Module, name: str) -> None:
    """Refuse a block whose weights are mostly not in linear layers or experts, which would silently stay as they are.

    Raises:
        ModelError: for example fused experts of a layout that cannot be taken apart.
    """
    total = sum(parameter.numel() for parameter in block.parameters())
    covered = sum(weight_of(linear).numel() for linear in find_linears(block).values())
    for experts in fused_experts(block):
        covered += sum(weight.numel() for weight in block.get_submodule(experts).parameters())
    if covered < MIN_QUANTIZED_SHARE * total:
        largest = max(block.named_parameters(), key=lambda item: item[1].numel())[0]
        raise ModelError(
            f"{name} ({type(block).__name__}): only {covered / total:.0%} of its {total:,} weights are in linear layers"
            f" or in experts of a known layout; the largest other weight is {largest}"
        )


def input_groups(block: nn.Module, linears: dict[str, nn.Module], forward: Callable[[], object]) -> list[list[str]]:
    """Names of all layers of a block, those that receive the same input together; layers of experts come last.

    Args:
        block: its experts unfused.
        linears: its layers, as `find_linears` names them.
        forward: runs the block once.

    Raises:
        ModelError: as for `group_by_input`.
    """
    experts = expert_groups(block)
    routed = {layer for group in experts for layer in group}
    return group_by_input({name: linear for name, linear in linears.items() if name not in routed}, forward) + experts


def group_by_input(linears: dict[str, nn.Module], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the layers that receive the very same input tensor, groups and names in the order of the calls.

    Args:
        linears: layers by name.
        forward: runs the block once.

    Raises:
        ModelError: a layer is not called, so that nothing is known about its inputs, or called twice.
    """
    inputs: list[Tensor] = []  # kept alive, so that identity is meaningful
    groups: list[list[str]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if any(name in group for group in groups):
                raise ModelError(
                    f"the layer {name!r} is called twice in a forward pass of its block, so that it has no single input"
                )
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
