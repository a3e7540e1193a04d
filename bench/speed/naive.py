"""The reference that speed-ups are ratios to: M is written out, then multiplied with v, step by step and uncompiled.

It stands for a direct implementation, and so for what the released code does where it writes M or more than M: Cauchy
and Vandermonde as a B x H x L x L x d contraction (here d tensors of B x H x L x L, all kept for the backward pass),
softmax attention, DFT and dense matrices. Its Toeplitz (FFT), low-rank (q (k' v)) and quasiseparable (a scan) layers
write no M either: there the ratio says what the structure is worth, not what the released layer takes.
Features come in fp32 under the autocast of the run: exponentials and sums in fp32, products in bf16, as released.
Axes: B batch, L length, H heads, P head width.
"""

import operator
from functools import partial, reduce

import torch
from torch import Tensor, nn

from bench.mixers.base import Features, Mixer


def by_matrix(mixer: Mixer, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> Tensor:
    """What `forward` gives, BLHP in the dtype of v, by the mixer's own `matrices`."""
    wide = torch.promote_types(v_BLHP.dtype, torch.float32)
    matrices = mixer.matrices(v_BLHP.to(wide), Features(*(x.to(wide) for x in features)), segments_BL)
    products = [torch.einsum("bhij,bjhp->bihp", m_BHLL.to(v_BLHP.dtype), v_BLHP) for m_BHLL in matrices]
    return reduce(operator.mul, products)


def materialise(layer: nn.Module) -> None:
    """Let every mixer of a layer compute by its matrix from now on."""
    for mixer, _ in layer.shell.parts():
        mixer.forward = partial(by_matrix, mixer)


def least_bytes(batch: int, heads: int, length: int) -> int:
    """M and its gradient in fp32: less than any cell of this kind needs."""
    return 2 * 4 * batch * heads * length**2
