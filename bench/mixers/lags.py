"""Products with matrices of constant diagonals given by their lags, shared by the long convolutions.

w_BHK holds the weights of lags -(L-1) .. L-1 (B = 1 if all rows share them), so that M_ij = w at lag i - j.
Axes: B batch, L length, H heads, P head width, K = 2 L - 1 lags; C blocks of T places each, N = 2 C points, F waves
(frequencies 0 .. C, cosine and sine of each), S both parts of the places of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.mixers.base import same_segment
from bench.mixers.waves import half_waves

SHORT = 1024
"""Up to this length the L x L matrix is faster than Fourier transforms on a GPU (sam: equal near 1,700 on an H200)."""

TILED, TILED_SHARED, TILED_WIDE = 2048, 1024, 8192
"""Up to this length by tiles on the tensor cores (kernels/toeplitz.py). In 16 bits beyond it by `by_blocks`, whose
matrices are made for each row where rows have weights of their own, or once where all share them: on an H200 a layer of
12 heads takes 2.19 ms at 2,048 tokens so and 1.99 by tiles, with shared weights 1.62 and 1.89. Else by transforms, for
which tiles take 1.3 times less at 8,192."""

BLOCK, LONG = 64, 32768
"""Places of a block of `by_blocks` up to a length; beyond it twice as many, for then the waves have more operations
than the matrices (counted, not timed)."""


def product(w_BHK: Tensor, v_BLHP: Tensor, segments_BL: Tensor, packed: bool) -> Tensor:
    """M v inside each document, BLHP; v is zero on padding already, rows of padding are for the caller."""
    if packed:
        return apply(spread(w_BHK) * same_segment(segments_BL), v_BLHP)
    if v_BLHP.shape[1] <= SHORT:
        return apply(spread(w_BHK.to(v_BLHP.dtype)), v_BLHP)
    if in_blocks(v_BLHP):
        return by_blocks(w_BHK, v_BLHP)
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


def in_blocks(v_BLHP: Tensor) -> bool:
    """Whether rows without a tile go by blocks: in 16 bits, by heads wide enough to pay for matrices of their own."""
    return v_BLHP.dtype.itemsize == 2 and v_BLHP.shape[-1] >= BLOCK


def by_blocks(w_BHK: Tensor, v_BLHP: Tensor) -> Tensor:
    """The same product, by products of matrices in the dtype of v: for tensor cores, where a transform has none.

    Cut into blocks of T places the matrix is one of T x T blocks that depend on the difference of two blocks' numbers
    only: a convolution over blocks, by a Fourier transform over as few points as there are blocks, twice, for padding.
    Each frequency then has one matrix of T x T complex numbers, which is of constant diagonals again.
    """
    batch, length, heads, width = v_BLHP.shape
    size = BLOCK if length <= LONG else 2 * BLOCK
    blocks = -(-length // size)
    v_BCTHP = F.pad(v_BLHP, (0, 0, 0, 0, 0, blocks * size - length)).unflatten(1, (blocks, size))
    if len(w_BHK) == 1:  # one matrix for all rows, which so are channels
        v_BHCM = v_BCTHP.permute(3, 1, 2, 0, 4).reshape(1, heads, blocks, size * batch * width)
    else:
        v_BHCM = v_BCTHP.permute(0, 3, 1, 2, 4).reshape(batch, heads, blocks, size * width)
    at_C = torch.arange(blocks, device=v_BLHP.device)
    to_FC = half_waves(at_C, 2 * blocks, v_BLHP)
    v_BHFSM = (to_FC @ v_BHCM).unflatten(2, (blocks + 1, 2)).unflatten(-1, (size, -1)).flatten(3, 4)
    y_BHFSM = _matrices(w_BHK.to(v_BLHP.dtype), size) @ v_BHFSM
    back_FC = to_FC * _counts(blocks, v_BLHP)[:, None]
    y_BHCM = back_FC.T @ y_BHFSM.unflatten(3, (2, size)).flatten(2, 3).flatten(3)
    if len(w_BHK) == 1:
        y_BCTHP = y_BHCM.view(heads, blocks, size, batch, width).permute(3, 1, 2, 0, 4)
    else:
        y_BCTHP = y_BHCM.view(batch, heads, blocks, size, width).permute(0, 2, 3, 1, 4)
    return y_BCTHP.flatten(1, 2)[:, :length]


def _counts(blocks: int, like: Tensor) -> Tensor:
    """What each wave counts for on the way back, F: of N, all frequencies but the first and the last stand for two."""
    count_F = torch.full((2 * (blocks + 1),), 1 / blocks, dtype=like.dtype, device=like.device)
    count_F[:2] = count_F[-2:] = 1 / (2 * blocks)
    return count_F


def _matrices(w_BHK: Tensor, size: int) -> Tensor:
    """The transformed blocks, BHFSS: of real and imaginary parts to real and imaginary parts."""
    length = (w_BHK.shape[-1] + 1) // 2
    blocks = -(-length // size)
    w_BHNT = F.pad(w_BHK, (blocks * size - length + 1, blocks * size - length)).unflatten(-1, (2 * blocks, size))
    at_N = torch.arange(-blocks, blocks, device=w_BHK.device)
    # Lag -r of a block is lag T - r of the block before it.
    ahead_BHFK = half_waves(at_N + 1, 2 * blocks, w_BHK) @ w_BHNT[..., 1:]
    behind_BHFK = half_waves(at_N, 2 * blocks, w_BHK) @ w_BHNT
    w_BHFK = torch.cat((ahead_BHFK, behind_BHFK), dim=-1)
    real_BHFTT, imaginary_BHFTT = spread(w_BHFK[:, :, 0::2]), spread(w_BHFK[:, :, 1::2])
    to_real_BHFTS = torch.cat((real_BHFTT, -imaginary_BHFTT), dim=-1)
    to_imaginary_BHFTS = torch.cat((imaginary_BHFTT, real_BHFTT), dim=-1)
    return torch.cat((to_real_BHFTS, to_imaginary_BHFTS), dim=-2)
