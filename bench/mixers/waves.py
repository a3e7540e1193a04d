"""What the mixers of the discrete Fourier transform share: its phases and its cost. No mixer, and so without a yaml.

Axes: L length.
"""

import math

import torch
from torch import Tensor

from bench.mixers.base import Grant


def turns(length: int, n: int, like: Tensor) -> Tensor:
    """i j / n less whole turns, LL, at least fp32, where `like` is: reduced as integers and so exact at any length."""
    at_L = torch.arange(length, device=like.device)
    return (at_L[:, None] * at_L % n).to(torch.promote_types(like.dtype, torch.float32)) / n


def transform_flops(grant: Grant, length: int) -> int:
    """Of a real transform of every channel, 2.5 n log2 n; of the matrix's product where rows are packed."""
    channels = grant.heads * grant.head_width
    if grant.packed:
        return 2 * channels * length**2
    n = max(length, grant.length)  # a shorter row is filled up
    return int(2.5 * n * math.log2(max(n, 2))) * channels
