"""Products with matrices of constant diagonals given by their lags, shared by the long convolutions.

w_BHK holds the weights of lags -(L-1) .. L-1 (B = 1 if all rows share them), so that M_ij = w at lag i - j.
Axes: B batch, L length, H heads, P head width, K = 2 L - 1 lags.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.mixers.base import same_segment

SHORT = 1024
"""Up to this length the L x L matrix is faster than Fourier transforms on a GPU (sam: equal near 1,700 on an H200)."""

TILED = 8192
"""Up to this length tiles on the tensor cores (kernels/toeplitz.py) are faster than they, at 8,192 by 1.3 (H200)."""


def product(w_BHK: Tensor, v_BLHP: Tensor, segments_BL: Tensor, packed: bool) -> Tensor:
    """M v inside each document, BLHP; v is zero on padding already, rows of padding are for the caller."""
    if packed:
        return apply(spread(w_BHK) * same_segment(segments_BL), v_BLHP)
    if v_BLHP.shape[1] <= SHORT:
        return apply(spread(w_BHK.to(v_BLHP.dtype)), v_BLHP)
    return convolve(w_BHK, v_BLHP)


def product_flops(length: int, heads: int, width: int, packed: bool) -> int:
    if packed or length <= SHORT:
        return 2 * heads * length**2 * width
    n = circle(length)  # a real transform of n points: 2.5 n log2 n
    return int(2.5 * n * (n.bit_length() - 1) * heads * (2 * width + 1)) + 3 * n * heads * width


def both_ways(behind_HL: Tensor, ahead_HL: Tensor) -> Tensor:
    """w_1HK from the weights of lags 0, 1, .. (a token and those before it) and of lags -1, -2, .. (those after it)."""
    return torch.cat((ahead_HL[:, :-1].flip(-1), behind_HL), dim=-1)[None]


def apply(m_BHLL: Tensor, v_BLHP: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP)


def spread(w_BHK: Tensor) -> Tensor:
    """M_BHLL with M_ij = w at lag i - j.

    A row of 2L numbers repeated L times and read back in rows of 2L - 1 moves by one place a row; unlike a gather, its
    gradient is a plain sum, without atomic additions.
    """
    *lead, k = w_BHK.shape
    length = (k + 1) // 2
    u_BHK = F.pad(w_BHK.flip(-1), (0, 1))
    flat = u_BHK[..., None, :].expand(*lead, length, 2 * length).reshape(*lead, 2 * length * length)
    return flat[..., : length * k].reshape(*lead, length, k)[..., length - 1 :]


def circle(length: int) -> int:
    """Points of a circular convolution whose wanted L outputs are free of wrap-around: a power of 2, >= 2L - 1."""
    return 1 << (2 * length - 2).bit_length()


def convolve(w_BHK: Tensor, v_BLHP: Tensor) -> Tensor:
    """The same product as apply(spread(w), v), by Fourier transforms in fp32 (or fp64)."""
    length = v_BLHP.shape[1]
    wide = torch.promote_types(v_BLHP.dtype, torch.float32)
    n = circle(length)
    w_BFH1 = torch.fft.rfft(w_BHK.to(wide), n=n).transpose(1, 2)[..., None]
    v_BFHP = torch.fft.rfft(v_BLHP.to(wide), n=n, dim=1)
    y_BNHP = torch.fft.irfft(w_BFH1 * v_BFHP, n=n, dim=1)
    return y_BNHP[:, length - 1 : 2 * length - 1].to(v_BLHP.dtype)
