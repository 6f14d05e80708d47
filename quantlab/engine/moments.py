"""Second moments of the inputs of a layer.

Notation: x is a token's input to the layer in the float model, x̂ its input behind the layers quantized so far. With
row groups, s is the token's saliency for group g of the layer's rows: the mean over the group's outputs z of
(d loss / dz)², scaled to a mean of 1 (GuidedQuant, arXiv:2505.07004, section 3). Otherwise s is 1.

    hessian  H = mean s x̂ x̂ᵀ                    (of s x xᵀ where float inputs are asked for)
    drift    D = mean s (x - x̂) x̂ᵀ

From D follows the error-propagating target: `quantlab.engine.target` says how. D is accumulated as it stands, since
the difference of two large products would lose its digits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.solvers.products import add_products

_ROWS_PER_MIRROR = 512  # copied below the diagonal at a time, so that no second matrix is needed


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The second moments that some rows are solved with.

    Attributes:
        hessian: H, (in_features, in_features) float32, exactly symmetric.
        drift: D, (in_features, in_features) float32; None without an error-propagating target.
    """

    hessian: Tensor
    drift: Tensor | None = None


class MomentSums:
    """Sums over tokens that the moments of one row group are the means of.

    Args:
        in_features: length of x.
        device: where to add up.
        saliency: (tokens,), s of every token of the text; None for 1.
        with_drift: whether D is needed.
    """

    def __init__(self, in_features: int, device: torch.device, saliency: Tensor | None, *, with_drift: bool) -> None:
        self._saliency = saliency
        self._hessian = torch.zeros(in_features, in_features, device=device)
        self._drift = torch.zeros(in_features, in_features, device=device) if with_drift else None

    def add(self, piece: Tensor, drift: Tensor | None, first_token: int) -> None:
        """Add tokens, (tokens, in_features) float32, the first of which has the given number."""
        if self._saliency is not None:
            root = self._saliency[first_token : first_token + len(piece), None].to(piece.device).sqrt()
            piece = piece * root
            drift = None if drift is None else drift * root
        add_products(self._hessian, piece, piece)
        if self._drift is not None and drift is not None:
            add_products(self._drift, drift, piece)

    def raw(self) -> tuple[Tensor, Tensor | None]:
        """The sums for H, of which only the upper triangle is complete, and for D."""
        return self._hessian, self._drift

    def absorb(self, hessian: Tensor, drift: Tensor | None) -> None:
        """Add the sums over other tokens."""
        self._hessian.add_(hessian)
        if self._drift is not None and drift is not None:
            self._drift.add_(drift)

    def finish(self, num_tokens: int) -> Moments:
        """The means; zero if there was no token."""
        for start in range(0, len(self._hessian), _ROWS_PER_MIRROR):
            slab = slice(start, start + _ROWS_PER_MIRROR)
            corner = self._hessian[slab, slab]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self._hessian[slab.stop :, slab] = self._hessian[slab, slab.stop :].T
        for total in (self._hessian, self._drift):
            if total is not None:
                total.div_(max(1, num_tokens))
        return Moments(hessian=self._hessian, drift=self._drift)
