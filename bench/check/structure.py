"""What a matrix class promises: predicates that a mixer may name in `structure()`, each measured on its matrix.

'free diagonal' is one more, in numbers.py: a matrix alone does not show it.

Each takes M_BHLL and the number behind its name (0 if none) and returns figure, limit and rule; at most is good.
"""

import torch
from torch import Tensor

from bench.check.algebra import EXACT
from bench.check.cosines import distance

Found = tuple[float, float, str]


def relative(x: Tensor, m_BHLL: Tensor) -> float:
    return float(x.abs().amax() / m_BHLL.abs().amax()) if x.numel() else 0.0


def rank_of(x: Tensor) -> float:
    return float(torch.linalg.matrix_rank(x, rtol=1e-9).amax())


def constant_diagonals(m_BHLL: Tensor, bound: int) -> Found:
    return relative(m_BHLL[..., 1:, 1:] - m_BHLL[..., :-1, :-1], m_BHLL), EXACT, "M_ij depends on i - j"


def lower_triangular(m_BHLL: Tensor, bound: int) -> Found:
    return relative(m_BHLL.triu(1), m_BHLL), 0.0, "nothing above the diagonal"


def zero_diagonal(m_BHLL: Tensor, bound: int) -> Found:
    return relative(m_BHLL.diagonal(dim1=-2, dim2=-1), m_BHLL), 0.0, "nothing on the diagonal"


def symmetric(m_BHLL: Tensor, bound: int) -> Found:
    return relative(m_BHLL - m_BHLL.transpose(-1, -2), m_BHLL), EXACT, "M_ij = M_ji"


def rows_sum_to_one(m_BHLL: Tensor, bound: int) -> Found:
    return float((m_BHLL.sum(-1) - 1).abs().amax()), EXACT, "distance of a row's sum from 1"


def positive(m_BHLL: Tensor, bound: int) -> Found:
    return max(0.0, -float(m_BHLL.amin())), 0.0, "no entry below zero"


def rank(m_BHLL: Tensor, bound: int) -> Found:
    return rank_of(m_BHLL), bound, "rank of M"


def off_diagonal_rank(m_BHLL: Tensor, bound: int) -> Found:
    length = m_BHLL.shape[-1]
    cuts = (length // 3, length // 2, 2 * length // 3)
    ranks = [max(rank_of(m_BHLL[..., c:, :c]), rank_of(m_BHLL[..., :c, c:])) for c in cuts]
    return max(ranks), bound, "rank of blocks strictly below or above the diagonal"


def lower_rank(m_BHLL: Tensor, bound: int) -> Found:
    """Blocks that touch the diagonal in their corner, as a semiseparable matrix has them."""
    length = m_BHLL.shape[-1]
    cuts = (length // 3, length // 2, 2 * length // 3)
    return max(rank_of(m_BHLL[..., c:, : c + 1]) for c in cuts), bound, "rank of blocks on or below the diagonal"


def rank_one_blocks(m_BHLL: Tensor, columns: int) -> Found:
    """Places on a grid of `columns`: fixed read column and written row leave a block of rank one (butterfly, order 2).

    Only whole rows of the grid are looked at.
    """
    rows = m_BHLL.shape[-1] // columns
    whole = m_BHLL[..., : rows * columns, : rows * columns]
    grid_BHXUYW = whole.unflatten(-1, (rows, columns)).unflatten(-3, (rows, columns))
    return rank_of(grid_BHXUYW.permute(0, 1, 3, 4, 2, 5)), 1, f"rank of blocks on a grid of {columns} columns"


def reciprocal_sums(m_BHLL: Tensor, bound: int) -> Found:
    """1 / M_ij = a_i + b_j, that is D_a M + M D_b = all ones, a displacement of rank 1: a Cauchy matrix of one term.

    So a difference of two rows of 1 / M is one number; the first row and column stand for all.
    """
    w_BHLL = m_BHLL.reciprocal()
    cross_BHLL = w_BHLL - w_BHLL[..., :1] - w_BHLL[..., :1, :] + w_BHLL[..., :1, :1]
    return relative(cross_BHLL, w_BHLL), EXACT, "1 / M_ij = a_i + b_j"


def differences_of_cosines(m_BHLL: Tensor, bound: int) -> Found:
    """One term of a sum of Vandermonde matrices in rows and in columns, as cosines.py says. The bound is above EXACT:
    a rounded entry of the first row is one of an angle that is multiplied by two places."""
    return distance(m_BHLL.flatten(0, 1)), 1e-6, "sqrt(L) M_ij = cos(t_i j) - cos(p_j i), places from 1"


PREDICATES = {
    "constant diagonals": constant_diagonals,
    "lower triangular": lower_triangular,
    "zero diagonal": zero_diagonal,
    "symmetric": symmetric,
    "rows sum to one": rows_sum_to_one,
    "positive": positive,
    "rank": rank,
    "off-diagonal rank": off_diagonal_rank,
    "lower rank": lower_rank,
    "rank-one blocks": rank_one_blocks,
    "reciprocal sums": reciprocal_sums,
    "differences of cosines": differences_of_cosines,
}
