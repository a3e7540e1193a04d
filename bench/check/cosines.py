"""Whether a matrix is a difference of cosines, M_ij = (cos(t_i j) - cos(p_j i)) / sqrt(L), i and j from 1 to L.

With a_i = cos t_i and b_j = cos p_j the entries are T_j(a_i) - T_i(b_j) up to the scale, T the Chebyshev polynomials.
The first row gives b_j = T_j(a_1) - m_1j, the first column a_i = m_i1 + T_i(b_1), and b_1 = a_1 - m_11. So one number,
t_1, predicts all L^2 entries. It is searched for on growing leading blocks. (Each part alone has displacement rank 2
under D_a X - X Z, Z = shift + its transpose, since cos t(j - 1) + cos t(j + 1) = 2 cos t cos tj; their difference has
not, and a sum of several terms hides all of it: this is for one term.)
Axes: N matrices, G guesses of t_1, I rows, J columns.
"""

import math

import torch
from torch import Tensor

START, SMALL, LARGE = 8192, 8, 48  # first guesses; leading blocks that they are tried on, from first to last
KEPT, AROUND = 4, 17  # best guesses that are refined, and new guesses around each


def distance(m_NLL: Tensor) -> float:
    """The largest entry, relative to M's largest, that the best t_1 does not predict; 2 or so for any other matrix."""
    m_NLL = m_NLL.double() * m_NLL.shape[-1] ** 0.5
    t_NG, step = (torch.arange(START) * (math.pi / START)).to(m_NLL).expand(len(m_NLL), -1), math.pi / START
    size = min(SMALL, m_NLL.shape[-1])
    best_N1 = t_NG[:, :1]
    while step > 1e-17:
        error_NG = (predicted(t_NG, m_NLL[:, :size, :size]) - m_NLL[:, None, :size, :size]).square().sum((-1, -2))
        order_NG = error_NG.argsort(-1)
        best_N1 = t_NG.gather(1, order_NG[:, :1])
        kept_NG = t_NG.gather(1, order_NG[:, :KEPT])
        t_NG = (kept_NG[..., None] + torch.linspace(-2, 2, AROUND).to(m_NLL) * step).flatten(1)
        step *= 4 / (AROUND - 1)
        size = min(LARGE, m_NLL.shape[-1], 2 * size)
    error_NLL = (predicted(best_N1, m_NLL)[:, 0] - m_NLL).abs()
    return float((error_NLL.amax((-1, -2)) / m_NLL.abs().amax((-1, -2))).amax())


def predicted(t_NG: Tensor, m_NIJ: Tensor) -> Tensor:
    """The block that each guess of t_1 makes of the first row and the first column, NGIJ."""
    place_I = torch.arange(1, m_NIJ.shape[-1] + 1).to(m_NIJ)
    p_NG = angle(t_NG.cos() - m_NIJ[:, :1, 0])
    a_NGI = m_NIJ[:, None, :, 0] + (place_I * p_NG[..., None]).cos()
    b_NGJ = (place_I * t_NG[..., None]).cos() - m_NIJ[:, None, 0]
    by_row_NGIJ = (angle(a_NGI)[..., None] * place_I).cos()
    by_column_NGIJ = (angle(b_NGJ)[:, :, None] * place_I[:, None]).cos()
    return by_row_NGIJ - by_column_NGIJ


def angle(cosine: Tensor) -> Tensor:
    """Of a number that rounding or a wrong guess may have put outside -1 and 1."""
    return cosine.clamp(-1, 1).arccos()
