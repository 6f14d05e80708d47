"""Joint descent: one code at a time, judged by the loss after the table has been refitted to the new codes.

Codes and table hold each other in place: no single code can be improved on a table that was fitted to it, and no table
on codes that were chosen for it. Where few inputs share a level, a change of one code moves that level visibly, and a
change that does not pay on the present table may pay on the one that it leads to. For the error e of a row, the
one-hot matrix S of its codes, g = e H and M = S H Sᵀ, moving input j from level a to level b changes the loss by

    -2 δ g_j + δ² H_jj - q M'⁻¹ qᵀ,    δ = t_b - t_a,    q = (g_j - δ H_jj) (1_b - 1_a) - δ S H_j,

where M' is M of the new codes and t is the best table for the old ones.
"""

import torch
from torch import Tensor

from quantlab.solvers.codebook import CodebookFit, Codebooks
from quantlab.solvers.sweep import Assignment
from quantlab_kernels import solver

_THRESHOLD = 1e-6
"""Share of the loss by which a change has to lower it: rounding must not make codes cycle."""
_RIDGE = 1e-9
_CANDIDATES = 2


def descend_jointly(
    weight: Tensor,
    start: Codebooks,
    loss: Tensor,
    hessian: Tensor,
    order: Tensor,
    fit: CodebookFit,
    *,
    passes: int,
) -> tuple[Codebooks, Tensor]:
    """Improve codes one at a time, and refit the tables; the loss of no row rises but by rounding.

    A change has to leave every level in use an input. Dead inputs keep their codes.

    Args:
        weight: (out_features, in_features).
        start: tables and codes.
        loss: (out_features,) float64, of `start`.
        hessian: (in_features, in_features), undamped, in the dtype of the weight.
        order: (in_features,) int64, the input visited first, second, and so on.
        fit: codebook steps for this weight and Hessian.
        passes: upper limit; a row ends when a pass changes nothing.

    Returns:
        Codebooks and their losses, (out_features,) float64.
    """
    live = order[hessian.diagonal()[order] > 0]
    if solver.usable(fit.product, start.levels, hessian):
        codes = start.codes.clone(memory_format=torch.contiguous_format)
        operands = (fit.product, codes, start.levels, loss, hessian, live)
        solver.descend_jointly(*operands, passes=passes, ridge=_RIDGE, threshold=_THRESHOLD)
    else:
        codes = _descend(fit.product, start, loss, hessian, live, passes)
    error = weight - Codebooks(levels=start.levels, codes=codes).dequantize()
    return fit.refit(start.levels, Assignment(codes=codes, error=error))


def _descend(product: Tensor, start: Codebooks, loss: Tensor, hessian: Tensor, order: Tensor, passes: int) -> Tensor:
    """The codes afterwards. All rows visit an input together; M' is solved as it stands, for every candidate."""
    count, codes, levels = start.levels.shape[1], start.codes.long(), start.levels.double()
    product, hessian = product.double(), hessian.double()
    members = torch.zeros(*codes.shape, count, dtype=torch.float64, device=codes.device).scatter_(
        2, codes[..., None], 1
    )
    members = members.mT * (hessian.diagonal() > 0)
    for _ in range(passes):
        coupled, before = members @ hessian, codes.clone()  # S, S H: (rows, levels, inputs)
        gram = coupled @ members.mT
        gradient = product - (levels[:, None] @ coupled).squeeze(1)
        levels = levels + _solve(gram, (members @ gradient[..., None]).squeeze(2))
        for column in order.tolist():
            energy, own, sizes = hessian[column, column], codes[:, column], members.sum(dim=2)
            gradient = product[:, column] - (levels * coupled[:, :, column]).sum(dim=1)
            present = levels.gather(1, own[:, None])
            distance = (levels - present - gradient[:, None] / energy).abs()
            distance = distance.masked_fill(sizes == 0, torch.inf).scatter(1, own[:, None], torch.inf)
            away, candidates = distance.topk(min(_CANDIDATES, count), dim=1, largest=False)
            step = levels.gather(1, candidates) - present
            moved = _one_hot(candidates, count) - _one_hot(own[:, None], count)
            sums = coupled[:, None, :, column].expand_as(moved)
            grams = gram[:, None] + _outer(moved, sums) + _outer(sums, moved) + energy * _outer(moved, moved)
            right = (gradient[:, None] - step * energy)[..., None] * moved - step[..., None] * sums
            correction = _solve(grams, right)
            change = step * (step * energy - 2 * gradient[:, None]) - (right * correction).sum(dim=2)
            least, index = change.masked_fill(away == torch.inf, torch.inf).min(dim=1)
            alone = sizes.gather(1, own[:, None]).squeeze(1) == 1
            rows = ((least < -_THRESHOLD * loss) & ~alone).nonzero().squeeze(1)
            chosen = index[rows]
            codes[rows, column] = candidates[rows, chosen]
            members[rows, :, column] += moved[rows, chosen]
            coupled[rows] += moved[rows, chosen][..., None] * hessian[column]
            gram[rows] = grams[rows, chosen]
            levels[rows] += correction[rows, chosen]
            loss = loss.index_add(0, rows, least[rows])
        if torch.equal(codes, before):
            break
    return codes.to(torch.uint8)


def _one_hot(codes: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(codes, count).double()


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """M x = right, scaled to a unit diagonal with a ridge; 0 for levels without live inputs."""
    energy = gram.diagonal(dim1=-2, dim2=-1)
    used = energy > _RIDGE * energy.amax(dim=-1, keepdim=True)
    scale = torch.where(used, energy, 1.0).rsqrt() * used
    scaled = scale[..., :, None] * gram * scale[..., None, :]
    scaled.diagonal(dim1=-2, dim2=-1).copy_(torch.where(used, 1 + _RIDGE, 1.0))
    solution: Tensor = torch.linalg.solve(scaled, (scale * right)[..., None])
    return solution.squeeze(-1) * scale
