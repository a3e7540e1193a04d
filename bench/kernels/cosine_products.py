"""Products with sums of cosines, c_BLHK of cosine_sums.py: rows y = c s and states s = c^T x.

Where c is too much to keep, it is made for a stretch of tokens at a time, used, and made again for the gradients: these
are the other product each, and of c's frequencies that of gc = x s^T. Time grows with L K all the same, memory with L.
Axes: B batch, L length, H heads, R rank (terms of a sum), K places of the sums, P head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.kernels.cosine_sums import cosine_sums, cosine_sums_backward
from bench.kernels.low_rank import apply_states, gather_rows

KEPT = 2**28
"""Numbers of c that exist at a time."""


def apply_cosines(f_BLHR: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """Rows y_BLHP = c s in the dtype of s, c of K places 0, spacing, ...; frequencies in fp32, of one row or of all."""
    batch, _, size, _ = s_BHKP.shape
    if _too_many(f_BLHR, batch, size):
        return apply_in_stretches(f_BLHR, s_BHKP, spacing)
    return apply_states(_kept(f_BLHR, batch, spacing, size, s_BHKP.dtype), s_BHKP)


def gather_cosines(f_BLHR: Tensor, x_BLHP: Tensor, spacing: int, size: int) -> Tensor:
    """States s_BHKP = c^T x in the dtype of x, K = `size`; added up in fp32."""
    if _too_many(f_BLHR, len(x_BLHP), size):
        return gather_in_stretches(f_BLHR, x_BLHP, spacing, size)
    return gather_rows(_kept(f_BLHR, len(x_BLHP), spacing, size, x_BLHP.dtype), x_BLHP)


def _too_many(f_BLHR: Tensor, batch: int, size: int) -> bool:
    _, length, heads, _ = f_BLHR.shape
    return batch * length * heads * size > KEPT


def _kept(f_BLHR: Tensor, batch: int, spacing: int, size: int, dtype: torch.dtype) -> Tensor:
    return cosine_sums(f_BLHR, spacing, size, dtype).expand(batch, -1, -1, -1)


def _stretches(f_BLHR: Tensor, batch: int, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Of the tokens: where they are, and their frequencies, one row for each of the batch."""
    _, length, heads, _ = f_BLHR.shape
    tokens = max(1, KEPT // (batch * heads * size))
    for start in range(0, length, tokens):
        at = slice(start, start + tokens)
        yield at, f_BLHR[:, at].expand(batch, -1, -1, -1)


@torch.library.custom_op("mixerbench::apply_cosines", mutates_args=())
def apply_in_stretches(f_BLHR: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    batch, _, size, width = s_BHKP.shape
    y_BLHP = s_BHKP.new_empty(batch, *f_BLHR.shape[1:3], width)
    for at, f in _stretches(f_BLHR, batch, size):
        y_BLHP[:, at] = apply_states(cosine_sums(f, spacing, size, s_BHKP.dtype), s_BHKP)
    return y_BLHP


@torch.library.custom_op("mixerbench::gather_cosines", mutates_args=())
def gather_in_stretches(f_BLHR: Tensor, x_BLHP: Tensor, spacing: int, size: int) -> Tensor:
    batch, _, heads, width = x_BLHP.shape
    s_BHKP = x_BLHP.new_zeros(batch, heads, size, width, dtype=torch.float32)
    for at, f in _stretches(f_BLHR, batch, size):
        s_BHKP += gather_rows(cosine_sums(f, spacing, size, x_BLHP.dtype), x_BLHP[:, at])
    return s_BHKP.to(x_BLHP.dtype)


@torch.library.custom_op("mixerbench::cosines_backward", mutates_args=())
def frequency_gradient(f_BLHR: Tensor, x_BLHP: Tensor, s_BHKP: Tensor, spacing: int) -> Tensor:
    """gf, like f, of the sum over tokens, heads and places of c (x s^T)."""
    gf_BLHR = f_BLHR.new_empty(len(x_BLHP), *f_BLHR.shape[1:])
    for at, f in _stretches(f_BLHR, len(x_BLHP), s_BHKP.shape[2]):
        gf_BLHR[:, at] = cosine_sums_backward(apply_states(x_BLHP[:, at], s_BHKP.transpose(2, 3)), f, spacing)
    return gf_BLHR.sum(0, keepdim=True) if len(f_BLHR) < len(gf_BLHR) else gf_BLHR


@apply_in_stretches.register_fake
def _(f_BLHR, s_BHKP, spacing):
    return s_BHKP.new_empty(len(s_BHKP), *f_BLHR.shape[1:3], s_BHKP.shape[-1])


@gather_in_stretches.register_fake
def _(f_BLHR, x_BLHP, spacing, size):
    return x_BLHP.new_empty(len(x_BLHP), f_BLHR.shape[2], size, x_BLHP.shape[-1])


@frequency_gradient.register_fake
def _(f_BLHR, x_BLHP, s_BHKP, spacing):
    return f_BLHR.new_empty(f_BLHR.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.spacing = inputs[2]


def _apply_gradients(ctx, gy_BLHP):
    f_BLHR, s_BHKP = ctx.saved_tensors
    gf_BLHR = frequency_gradient(f_BLHR, gy_BLHP, s_BHKP, ctx.spacing)
    return gf_BLHR, gather_in_stretches(f_BLHR, gy_BLHP, ctx.spacing, s_BHKP.shape[2]), None


def _gather_gradients(ctx, gs_BHKP):
    f_BLHR, x_BLHP = ctx.saved_tensors
    gf_BLHR = frequency_gradient(f_BLHR, x_BLHP, gs_BHKP, ctx.spacing)
    return gf_BLHR, apply_in_stretches(f_BLHR, gs_BHKP, ctx.spacing), None, None


apply_in_stretches.register_autograd(_apply_gradients, setup_context=_keep)
gather_in_stretches.register_autograd(_gather_gradients, setup_context=_keep)
