"""GANQ (arXiv:2501.12956) written down as in the paper: a loop over columns, and one-hot matrices.

It is what `quantlab_ganq` is compared with, for the answer by the oracle tests, for time by
`tests/bench/solvers.py`. Dense and slow on purpose, but not more than a careful reader of the paper would make it.
"""

import torch
from torch import Tensor

_ROWS_PER_CHUNK = 256  # whose one-hot matrices are held at a time


def textbook_ganq(
    weight: Tensor, hessian: Tensor, table: Tensor, iterations: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 from a given first table; the best iterate of the layer is kept.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features), undamped.
        table: (out_features, levels).
        iterations: pairs of assignment and codebook step.
        damping: fraction of the mean diagonal added for the factorisation.

    Returns:
        The dequantized weight, and the loss of every iteration, (iterations,).
    """
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    lower = torch.linalg.cholesky(damped).to(weight.dtype)
    best, losses = weight, []
    for _ in range(iterations):
        codes = assignment_step(weight, lower, table)
        table = codebook_step(weight, hessian, codes, table.shape[1])
        weight_hat = table.gather(1, codes)
        error = weight - weight_hat
        losses.append(((error @ hessian) * error).sum(dtype=torch.float64))
        if losses[-1] == min(losses):
            best = weight_hat
    return best, torch.stack(losses)


def assignment_step(weight: Tensor, lower: Tensor, table: Tensor) -> Tensor:
    """Back substitution (Eq. 20), from the last column to the first: codes (out_features, in_features)."""
    codes = torch.empty(weight.shape, dtype=torch.long)
    error = torch.zeros_like(weight)
    for j in reversed(range(weight.shape[1])):
        target = weight[:, j] + error[:, j + 1 :] @ lower[j + 1 :, j] / lower[j, j]
        codes[:, j] = (target[:, None] - table).abs().argmin(dim=1)
        error[:, j] = weight[:, j] - table.gather(1, codes[:, j : j + 1])[:, 0]
    return codes


def codebook_step(weight: Tensor, hessian: Tensor, codes: Tensor, levels: int) -> Tensor:
    """Levels t = w H Sᵀ (S H Sᵀ)⁺ of every row (Eq. 7), with the one-hot matrix S of its codes."""
    tables = []
    for rows in torch.arange(len(weight)).split(_ROWS_PER_CHUNK):
        one_hot = weight.new_zeros(len(rows), levels, weight.shape[1]).scatter_(1, codes[rows][:, None], 1.0)
        coupled = one_hot @ hessian
        gram, right = coupled @ one_hot.mT, coupled @ weight[rows][..., None]
        tables.append((torch.linalg.pinv(gram.double(), hermitian=True) @ right.double()).squeeze(2))
    return torch.cat(tables).to(weight.dtype)
