"""Products with sums of cosines that are too many to keep: c_BLHK of cosine_sums.py is made for a stretch of tokens at
a time, used, and made again for the gradient.

y = c s, s = c^T x and the gradient of c's frequencies, for which gc = x s^T, are three operators, of which the first
two are each other's gradient. Time grows with L K still, memory with L.
Axes: B batch, L length, H heads, R rank (terms of a sum), K places of the sums, P head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.cosine_sums import cosine_sums, cosine_sums_backward
from bench.kernels.low_rank import apply_states, gather_rows

KEPT = 2**28
"""Numbers of c that exist at a time."""


def too_many(batch: int, length: int, heads: int, size: int) -> bool:
    """Whether c is better made in stretches."""
    return batch * length * heads * size > KEPT


def _stretches(x_BLHP: Tensor, f_BLHR: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Of the tokens: where they are, their frequencies, one row for each of the batch."""
    batch, length, heads, _ = x_BLHP.shape
    tokens = max(1, KEPT // (batch * heads * size))
    for start in range(0, length, tokens):
        at = slice(start, start + tokens)
        yield at, f_BLHR[:, at].expand(batch, -1, -1, -1)


@torch.library.custom_op("mixerbench::apply_cosines", mutates_args=())
def apply_cosines(f_BLHR: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """Rows y_BLHP = c s in the dtype of s, c of K places 0, spacing, ...; frequencies in fp32, of one row or of all."""
    batch, _, size, width = s_BHKP.shape
    y_BLHP = s_BHKP.new_empty(batch, *f_BLHR.shape[1:3], width)
    for at, f in _stretches(y_BLHP, f_BLHR, size):
        y_BLHP[:, at] = apply_states(cosine_sums(f, spacing, size, s_BHKP.dtype), s_BHKP)
    return y_BLHP


@torch.library.custom_op("mixerbench::gather_cosines", mutates_args=())
def gather_cosines(f_BLHR: Tensor, x_BLHP: Tensor, spacing: int, size: int) -> Tensor:
    """States s_BHKP = c^T x in the dtype of x, K = `size`; added up in fp32."""
    batch, _, heads, width = x_BLHP.shape
    s_BHKP = x_BLHP.new_zeros(batch, heads, size, width, dtype=torch.float32)
    for at, f in _stretches(x_BLHP, f_BLHR, size):
        s_BHKP += gather_rows(cosine_sums(f, spacing, size, x_BLHP.dtype), x_BLHP[:, at])
    return s_BHKP.to(x_BLHP.dtype)


@torch.library.custom_op("mixerbench::cosines_backward", mutates_args=())
def cosines_backward(f_BLHR: Tensor, x_BLHP: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """The gradient of f, like f, of the sum over tokens, heads and places of c (x s^T)."""
    gf_BLHR = f_BLHR.new_empty(len(x_BLHP), *f_BLHR.shape[1:])
    for at, f in _stretches(x_BLHP, f_BLHR, s_BHKP.shape[2]):
        gf_BLHR[:, at] = cosine_sums_backward(apply_states(x_BLHP[:, at], s_BHKP.transpose(2, 3)), f, spacing)
    return gf_BLHR.sum(0, keepdim=True) if len(f_BLHR) < len(gf_BLHR) else gf_BLHR


@apply_cosines.register_fake
def _(f_BLHR, s_BHKP, spacing):
    return s_BHKP.new_empty(len(s_BHKP), *f_BLHR.shape[1:3], s_BHKP.shape[-1])


@gather_cosines.register_fake
def _(f_BLHR, x_BLHP, spacing, size):
    batch, _, heads, width = x_BLHP.shape
    return x_BLHP.new_empty(batch, heads, size, width)


@cosines_backward.register_fake
def _(f_BLHR, x_BLHP, s_BHKP, spacing):
    return f_BLHR.new_empty(f_BLHR.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.spacing = inputs[2]


def _apply_gradients(ctx, gy_BLHP):
    f_BLHR, s_BHKP = ctx.saved_tensors
    gf_BLHR = cosines_backward(f_BLHR, gy_BLHP, s_BHKP, ctx.spacing)
    return gf_BLHR, gather_cosines(f_BLHR, gy_BLHP, ctx.spacing, s_BHKP.shape[2]), None


def _gather_gradients(ctx, gs_BHKP):
    f_BLHR, x_BLHP = ctx.saved_tensors
    gf_BLHR = cosines_backward(f_BLHR, x_BLHP, gs_BHKP, ctx.spacing)
    return gf_BLHR, apply_cosines(f_BLHR, gs_BHKP, ctx.spacing), None, None


apply_cosines.register_autograd(_apply_gradients, setup_context=_keep)
gather_cosines.register_autograd(_gather_gradients, setup_context=_keep)
