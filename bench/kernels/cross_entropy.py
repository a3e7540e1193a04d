"""Cross-entropy over a vocabulary in one pass over the logits each way, summed over rows.

    loss = sum over n of log(sum over c of exp(x_nc)) - x_n,label;  gradient of x = (exp(x - lse) - onehot) g
All in fp32 between bf16 loads and stores. Rows whose label is `unused` add nothing and are not read. A row is read in
blocks, each once: the largest logit of the blocks so far stands before the exponentials, of which each logit has one.
Any C will do; threads read and write 16 bytes at once where 16 divides it, as it does a padded vocabulary.
Axes: N rows, C classes; X classes of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, STAGES = 4096, 4, 1
"""Of the values: classes of a block, warps of a program, blocks on their way from memory with the one worked on. So
several programs fit on a multiprocessor, and some read while others compute: one with a whole row leaves no room."""
BLOCK_BACK, WARPS_BACK = 4096, 4
"""Of the gradient: classes and warps of a program, which has no more than one block."""
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)  # finite: a logit of minus infinity has the exponential 0


@triton.jit
def _values(
    x_ptr, labels_ptr, loss_ptr, lse_ptr, channels, unused, X: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A row's loss and the logarithm of its sum, 0 where it is unused."""
    n = tl.program_id(0).to(tl.int64)
    label, c_X = tl.load(labels_ptr + n), tl.arange(0, X)
    used, at = label != unused, x_ptr + n * channels
    known = used & (label >= 0) & (label < channels)
    most, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for start in tl.range(0, tl.where(used, channels, 0), X, num_stages=STAGES):
        x_X = tl.load(at + start + c_X, mask=start + c_X < channels, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, tl.max(x_X, 0))
        total = total * tl.exp2((most - more) * LOG2E) + tl.sum(tl.exp2((x_X - more) * LOG2E), 0)
        most = more
    log = tl.log(tl.where(used, total, 1.0))
    own = tl.load(at + label, mask=known, other=float("nan")).to(tl.float32)  # a label that is no class: no loss
    tl.store(loss_ptr + n, tl.where(used, most - own + log, 0.0))  # not lse - own: of large ones little would be left
    tl.store(lse_ptr + n, tl.where(used, most + log, 0.0))


@triton.jit
def _gradient(g_ptr, x_ptr, labels_ptr, lse_ptr, gx_ptr, channels, unused, X: tl.constexpr):
    """A block of a row. One axis: a grid's others end at 65,535."""
    blocks = tl.cdiv(channels, X)
    n, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * X
    label, lse, c_X = tl.load(labels_ptr + n), tl.load(lse_ptr + n), start + tl.arange(0, X)
    used, at = label != unused, n * channels
    g = tl.where(used, tl.load(g_ptr), 0.0)
    x_X = tl.load(x_ptr + at + c_X, mask=c_X < tl.where(used, channels, 0), other=0.0).to(tl.float32)
    share_X = tl.exp2((x_X - lse) * LOG2E) - tl.where(c_X == label.to(tl.int32), 1.0, 0.0)
    tl.store(gx_ptr + at + c_X, share_X * g, mask=c_X < channels)


def _size(block: int, warps: int, channels: int) -> dict:
    """Of a program: a row that is shorter than a block has a smaller one, and 16 bytes of bf16 for each thread."""
    block = min(block, triton.next_power_of_2(channels))
    return {"X": block, "num_warps": max(1, min(warps, block // 256))}


@torch.library.custom_op("mixerbench::cross_entropy", mutates_args=())
def cross_entropy(logits_NC: Tensor, labels_N: Tensor, unused: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows' losses, a scalar of fp32, and for the gradient the logarithm of each row's sum, lse_N in fp32.

    Logits are of bf16 or fp32, labels classes or `unused`."""
    logits_NC, labels_N, (rows, channels) = logits_NC.contiguous(), labels_N.contiguous(), logits_NC.shape
    loss_N, lse_N = (torch.empty(rows, dtype=torch.float32, device=logits_NC.device) for _ in range(2))
    if rows:
        size = _size(BLOCK, WARPS, channels)
        _values[(rows,)](logits_NC, labels_N, loss_N, lse_N, channels, unused, STAGES=STAGES, **size)
    return loss_N.sum(), lse_N


@torch.library.custom_op("mixerbench::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(g: Tensor, logits_NC: Tensor, labels_N: Tensor, lse_N: Tensor, unused: int) -> Tensor:
    """The gradient of the logits, in their dtype; g is that of the loss, a scalar of fp32."""
    logits_NC, labels_N, (rows, channels) = logits_NC.contiguous(), labels_N.contiguous(), logits_NC.shape
    gx_NC, size = torch.empty_like(logits_NC), _size(BLOCK_BACK, WARPS_BACK, channels)
    if rows:
        grid = (rows * triton.cdiv(channels, size["X"]),)
        _gradient[grid](g, logits_NC, labels_N, lse_N, gx_NC, channels, unused, **size)
    return gx_NC


@cross_entropy.register_fake
def _(logits_NC, labels_N, unused):
    lse_N = logits_NC.new_empty(logits_NC.shape[0], dtype=torch.float32)
    return lse_N.new_empty(()), lse_N


@cross_entropy_backward.register_fake
def _(g, logits_NC, labels_N, lse_N, unused):
    return logits_NC.new_empty(logits_NC.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.unused = inputs[2]


def _gradients(ctx, g, glse_N):
    """The logarithms are for the gradient alone: they have none."""
    return cross_entropy_backward(g, *ctx.saved_tensors, ctx.unused), None, None


cross_entropy.register_autograd(_gradients, setup_context=_keep)
