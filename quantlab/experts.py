"""Mixtures of experts: fused expert weights taken apart into one linear layer per expert and projection.

transformers keeps the experts of a block in 3-D parameters, (experts, out_features, in_features), behind one
interface that says how they are laid out. Quantization is per linear layer, and each expert has its own inputs:
the tokens that the router sends to it. The separated form computes the same up to the order of float additions.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError

# How a fused module lays its weights out; set on every module that follows the interface.
_LAYOUT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
# Classes that do not follow it, with what it would say. The experts of Llama 4 get inputs that are sorted by expert and
# scaled already, those of LongCat-Flash are followed by some that return their input, and DBRX has matrices of its own.
_OTHER_LAYOUTS = {
    "Llama4TextExperts": dict(zip(_LAYOUT, (True, False, False, True, True), strict=True)),
    "LongcatFlashExperts": dict(zip(_LAYOUT, (True, False, False, False, True), strict=True)),
    "DbrxExperts": dict(zip(_LAYOUT, (True, False, False, False, True), strict=True)),
}


class UnfusedExperts(nn.Module):
    """Experts with linear layers `3.gate_proj`, `3.up_proj` and `3.down_proj` (here of expert 3).

    Experts without a gate have no `gate_proj`. Other modules of the fused form, such as an activation with
    parameters, keep their names.

    Args:
        fused: follows the experts interface of transformers; its parameters are taken out of it.

    Attributes:
        num_experts: how many there are.
        returns_input: whether experts beyond these return what they are given.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule; it still knows the gating function and its constants.
        self._fused: tuple[Any] = (fused,)
        projections = _take_projections(fused)
        self.num_experts = len(projections["down_proj"])
        self.returns_input = hasattr(fused, "identity_expert")
        for name, child in fused.named_children():
            self.add_module(name, child)
        for index in range(self.num_experts):
            linears = {name: projection[index] for name, projection in projections.items()}
            self.add_module(str(index), nn.ModuleDict(linears))
        self._hear_all: frozenset[int] = frozenset()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts, added up in float32.

        Args:
            hidden_states: (..., hidden_size), with as many tokens as the other two.
            top_k_index: (tokens, experts per token); experts that do not exist contribute nothing.
            top_k_weights: (tokens, experts per token).

        Returns:
            (..., hidden_size).
        """
        shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        if self.returns_input:
            tokens, ranks = torch.where(top_k_index >= self.num_experts)
            inputs = hidden_states[tokens] * top_k_weights[tokens, ranks, None]
            total.index_add_(0, tokens, inputs.to(total.dtype))
        for index in range(self.num_experts):
            tokens, ranks = torch.where(top_k_index == index)
            if index in self._hear_all:
                outputs = self._run(index, hidden_states)[tokens]
            elif len(tokens):
                outputs = self._run(index, hidden_states[tokens])
            else:
                continue
            total.index_add_(0, tokens, (outputs * top_k_weights[tokens, ranks, None]).to(total.dtype))
        return total.to(hidden_states.dtype).view(shape)

    def _run(self, index: int, states: Tensor) -> Tensor:
        (fused,) = self._fused
        expert: Any = self.get_submodule(str(index))
        up = expert["up_proj"](states)
        if fused.has_gate:
            gate = expert["gate_proj"](states)
            joined = torch.cat((gate, up), -1) if fused.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
            inner = fused._apply_gate(joined)
        else:
            inner = fused.act_fn(up)
        output: Tensor = expert["down_proj"](inner)
        return fused.post_expert_norm(output) if fused.has_post_expert_norm else output


class UnfusedSortedExperts(UnfusedExperts):
    """Experts that are given one copy of all tokens each, in which those sent to other experts are zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # another calling convention
        """The output of each expert for its copy of the tokens.

        Args:
            hidden_states: (experts * tokens, hidden_size), scaled by the router.

        Returns:
            (experts * tokens, hidden_size), zero where the input is.
        """
        copies = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        routed = copies.any(-1)
        output = torch.zeros_like(copies)
        for index in range(self.num_experts):
            own = routed[index]
            if index in self._hear_all:
                mine = torch.zeros_like(routed)
                mine[index] = own
                output[index, own] = self._run(index, copies[routed])[mine[routed]]
            elif own.any():
                output[index, own] = self._run(index, copies[index, own])
        return output.view_as(hidden_states)


def fused_experts(module: nn.Module) -> list[str]:
    """Names of the submodules whose weights are fused over experts and can be taken apart."""
    return [name for name, child in module.named_modules() if _is_fused(child)]


def unfuse(module: nn.Module, names: Iterable[str]) -> None:
    """Replace fused experts by separate linear layers, on whatever device (meta included) they are.

    Args:
        module: a model or a block; changed in place.
        names: of submodules, as `fused_experts` gives them.

    Raises:
        ModelError: a name is not that of a module with fused experts.
    """
    for name in names:
        try:
            fused = module.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"{type(module).__name__} has no module {name} with fused experts") from error
        if not _is_fused(fused):
            raise ModelError(f"{name} in {type(module).__name__} is {type(fused).__name__}, which has no fused experts")
        module.set_submodule(name, _separate(fused))


def expert_groups(module: nn.Module) -> list[list[str]]:
    """Names of the layers of unfused experts, those with the same input together, in the order of the calls.

    An expert that no token is sent to is not called, so that its groups cannot be found by watching a forward pass.
    """
    groups: list[list[str]] = []
    for name, experts in _unfused(module):
        for index in range(experts.num_experts):
            linears: Any = experts.get_submodule(str(index))
            groups.append([f"{name}.{index}.{layer}" for layer in linears if layer != "down_proj"])
            groups.append([f"{name}.{index}.down_proj"])
    return groups


@contextmanager
def all_tokens_for(module: nn.Module, layers: Iterable[str]) -> Iterator[None]:
    """Inside, the experts that own the layers are run on all tokens of their mixture, wherever those are sent.

    This gives experts that the router hardly ever chooses inputs to be calibrated on. What the mixture computes
    stays the same up to rounding, since the router's choice still decides which outputs are used.

    Args:
        module: a model or a block.
        layers: names as `expert_groups` gives them.
    """
    layers = list(layers)
    chosen = {
        experts: frozenset(
            int(layer.removeprefix(f"{name}.").partition(".")[0]) for layer in layers if layer.startswith(f"{name}.")
        )
        for name, experts in _unfused(module)
    }
    for experts, indices in chosen.items():
        experts._hear_all = indices
    try:
        yield
    finally:
        for experts in chosen:
            experts._hear_all = frozenset()


def _unfused(module: nn.Module) -> Iterator[tuple[str, UnfusedExperts]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, UnfusedExperts))


def _is_fused(module: nn.Module) -> bool:
    if type(module).__name__ == "DbrxExperts":
        return module.get_submodule("mlp")._parameters.get("w2") is not None
    known = type(module).__name__ in _OTHER_LAYOUTS or all(hasattr(module, attribute) for attribute in _LAYOUT)
    return known and module._parameters.get("down_proj") is not None


def _separate(fused: Any) -> UnfusedExperts:
    name = type(fused).__name__
    if name not in _OTHER_LAYOUTS:
        return UnfusedExperts(fused)
    for attribute, value in _OTHER_LAYOUTS[name].items():
        setattr(fused, attribute, value)
    if name == "DbrxExperts":
        _rearrange_dbrx(fused)

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = fused.act_fn(gate) * up
        return gated

    fused._apply_gate = apply_gate
    return UnfusedSortedExperts(fused) if name == "Llama4TextExperts" else UnfusedExperts(fused)


def _rearrange_dbrx(fused: Any) -> None:
    """Parameters as in the interface, in place of DBRX's three of (experts * ffn_hidden_size, hidden_size)."""
    mlp = fused.mlp
    gate, up, down = (
        mlp._parameters.pop(name).detach().view(fused.num_experts, fused.ffn_hidden_size, fused.hidden_size)
        for name in ("w1", "v1", "w2")
    )
    fused.gate_up_proj = nn.Parameter(torch.cat((gate, up), dim=1), requires_grad=False)
    fused.down_proj = nn.Parameter(down.transpose(1, 2), requires_grad=False)
    fused.act_fn = mlp.activation_fn
    del fused.mlp


def _take_projections(fused: Any) -> dict[str, list[nn.Linear]]:
    """One linear layer per projection and expert; removes the parameters from the module."""
    projections = {}
    for name in ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj"):
        weight = fused._parameters.pop(name)
        bias = fused._parameters.pop(f"{name}_bias") if fused.has_bias else None
        if fused.is_transposed:
            weight = weight.transpose(1, 2)
        if name == "gate_up_proj":
            half = weight.shape[1] // 2
            gate, up = (
                (slice(half), slice(half, None)) if fused.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
            )
            parts = {"gate_proj": gate, "up_proj": up}
        else:
            parts = {name: slice(None)}
        for part, rows in parts.items():
            projections[part] = [
                _linear(weight[index, rows], None if bias is None else bias[index, rows])
                for index in range(len(weight))
            ]
    if fused._parameters or fused._buffers:
        raise ModelError(
            f"{type(fused).__name__}: has the tensors {[*fused._parameters, *fused._buffers]} besides its projections"
        )
    return projections


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    return linear
