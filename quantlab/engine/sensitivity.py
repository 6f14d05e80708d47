"""How sensitive the loss is to a linear layer: what is kept of its gradients, sequence by sequence.

The loss of a sequence is the mean cross-entropy of its next tokens. With x what enters the layer at a token, z what
leaves it, and g = d loss / dz, the gradient of the loss by the weight is the sum over the sequence's tokens of g xᵀ.
Two things are kept:

    Fisher diagonal   mean over sequences of (sum over tokens of g xᵀ)², squared entry by entry
    saliency          mean over the outputs of a row group of g², for every token, scaled to a mean of 1 over the layer
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from quantlab.engine.linears import weight_of
from quantlab.engine.statistics import StatisticsOptions, row_groups
from quantlab.errors import ModelError


class LayerSensitivity:
    """Accumulates both for one layer.

    Args:
        name: of the layer, for errors.
        linear: the layer.
        input_ids: (sequences, tokens), the text.
        options: which of the two are needed.
    """

    def __init__(self, name: str, linear: nn.Module, input_ids: Tensor, options: StatisticsOptions) -> None:
        self._name = name
        self._num_sequences, self._length = input_ids.shape
        weight = weight_of(linear)
        self._fisher = torch.zeros(weight.shape, device=weight.device) if options.fisher else None
        self._rows = row_groups(weight.shape[0], options.saliency_groups) if options.saliency_groups else []
        self._saliency = torch.zeros(len(self._rows), input_ids.numel(), device=weight.device)
        self._seen = 0

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add a sequence.

        Args:
            inputs: x, (..., in_features).
            gradient: of the summed, not the mean, cross-entropy: g times the predicted tokens, (..., out_features).
        """
        inputs, gradient = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (inputs, gradient))
        if self._fisher is not None:
            self._fisher += (gradient.T @ inputs).square_()
        tokens = slice(self._seen, self._seen + len(gradient))
        for group, rows in enumerate(self._rows):
            self._saliency[group, tokens] = gradient[:, rows].square().mean(dim=1)
        self._seen += len(gradient)

    def finish(self) -> dict[str, Tensor]:
        """What is needed: "fisher", (out_features, in_features), and "saliency", (row groups, tokens), float32.

        Raises:
            ModelError: saliency is needed, but the layer did not receive every token.
        """
        kept = {}
        if self._fisher is not None:
            kept["fisher"] = self._fisher / (self._num_sequences * max(1, self._length - 1) ** 2)
        if self._rows:
            if self._seen != self._saliency.shape[1]:
                raise ModelError(
                    f"{self._name}: received {self._seen} of {self._saliency.shape[1]} tokens, as a layer behind a "
                    "router does, so that its saliency cannot be told token by token; use saliency_groups: 0"
                )
            kept["saliency"] = self._saliency / (self._saliency.mean() or 1)
        return kept


@contextmanager
def observed(linears: Mapping[str, nn.Module], sensitivities: Mapping[str, LayerSensitivity]) -> Iterator[None]:
    """Inside, a forward and backward pass over one sequence adds it to the sensitivities of the layers called.

    Raises:
        ModelError: in the forward pass, if a layer is called twice or does not depend on the hidden states.
    """
    called: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in called or not output.requires_grad:
                fault = "is called twice in one forward pass" if name in called else "is not fed by the hidden states"
                raise ModelError(f"{name} {fault}, so that its gradients cannot be collected block by block")
            called.add(name)
            inputs = args[0].detach()
            output.register_hook(lambda gradient: sensitivities[name].add(inputs, gradient))

        return hook

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(watch(name)).remove)
        yield
