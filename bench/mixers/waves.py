"""What the mixers of the discrete Fourier transform share: its phases, a fast way for its real part, and its cost.

No mixer, and so without a yaml.
Axes: B batch, L length, H heads, P head width; of n = A J places: A stretches of J places each, F waves (frequencies
0 .. A / 2, cosine and sine of each), I outputs of a frequency, S both parts of J.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.mixers.base import Grant


def turns(length: int, n: int, like: Tensor) -> Tensor:
    """i j / n less whole turns, LL, at least fp32, where `like` is: reduced as integers and so exact at any length."""
    at_L = torch.arange(length, device=like.device)
    return (at_L[:, None] * at_L % n).to(torch.promote_types(like.dtype, torch.float32)) / n


def half_waves(at_N: Tensor, points: int, like: Tensor) -> Tensor:
    """cos and -sin of 2 pi f n / points, FN, for the frequencies 0 .. points / 2; phases less whole turns, as integers
    and so exact."""
    wide = torch.promote_types(like.dtype, torch.float32)
    at_F = torch.arange(points // 2 + 1, device=like.device)
    phase_FN = 2 * math.pi * (at_F[:, None] * at_N % points).to(wide) / points
    return torch.stack((phase_FN.cos(), -phase_FN.sin()), dim=1).flatten(0, 1).to(like.dtype)


def stretches(n: int) -> int | None:
    """A of `real_part`, the even divisor of n nearest to its root; None where A or J would be above 1,024."""
    even = [a for a in range(2, min(n, 1024) + 1, 2) if n % a == 0 and n // a <= 1024]
    return min(even, key=lambda a: abs(math.log(a * a / n)), default=None)


def real_part(v_BLHP: Tensor, n: int) -> Tensor:
    """sum over j of cos(2 pi i j / n) v_j, BLHP, by products of matrices in the dtype of v, for tensor cores.

    With j = J a + j' and i = f + A i' the phase i j / n is f a / A + i j' / n and whole turns: a sum over a for each f
    and j', then one over j' for each i. Frequencies above A / 2 are those below it, as y_i = y_{n-i}. Raises TypeError
    where `stretches` has none.
    """
    (batch, length, heads, width), a = v_BLHP.shape, stretches(n)
    j = n // a
    wide = torch.promote_types(v_BLHP.dtype, torch.float32)
    at_F, at_A, at_J = (torch.arange(size, device=v_BLHP.device) for size in (a // 2 + 1, a, j))
    v_BAM = F.pad(v_BLHP, (0, 0, 0, 0, 0, n - length)).reshape(batch, a, j * heads * width)
    v_BFSM = (half_waves(at_A, a, v_BLHP) @ v_BAM).view(batch, a // 2 + 1, 2 * j, heads * width)
    phase_FIJ = 2 * math.pi * ((at_F[:, None] + a * at_J)[..., None] * at_J % n).to(wide) / n
    y_BFIM = torch.cat((phase_FIJ.cos(), phase_FIJ.sin()), dim=-1).to(v_BLHP.dtype) @ v_BFSM
    mirror_BFIM = y_BFIM[:, 1 : a // 2].flip(1, 2)
    y_BIAM = torch.cat((y_BFIM, mirror_BFIM), dim=1).transpose(1, 2)
    return y_BIAM.reshape(batch, n, heads, width)[:, :length]


def transform_flops(grant: Grant, length: int) -> int:
    """Of a real transform of every channel, 2.5 n log2 n; of the matrix's product where rows are packed."""
    channels = grant.heads * grant.head_width
    if grant.packed:
        return 2 * channels * length**2
    n = max(length, grant.length)  # a shorter row is filled up
    return int(2.5 * n * math.log2(max(n, 2))) * channels
