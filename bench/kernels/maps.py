"""Several linear maps of one input, whose gradient the products add up as they go: none is written only to be added.

The sum is rounded after each product, to bf16 under autocast, where torch alone would round each product and add in
fp32: a little farther from exact gradients (`stream` of tests/kernel_cases.py bounds how far).
Axes: B batch, L length, D width, K outputs of a map; N rows = B L.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("mixerbench::sum_of_products", mutates_args=())
def sum_of_products(left_NK: list[Tensor], right_KD: list[Tensor]) -> Tensor:
    """sum_ND in the dtype of all, to which it is rounded after each product."""
    sum_ND = left_NK[0] @ right_KD[0]
    for g_NK, weight_KD in zip(left_NK[1:], right_KD[1:], strict=True):
        sum_ND.addmm_(g_NK, weight_KD)
    return sum_ND


@sum_of_products.register_fake
def _(left_NK, right_KD):
    return left_NK[0].new_empty(len(left_NK[0]), right_KD[0].shape[1])


class Maps(torch.autograd.Function):
    """x_BLD W_KD^T for each of the weights, two or three, all of the dtype of x.

    Each has a name of its own: given *weights, torch.compile counts one argument for another where no gradient is
    asked for, and fails with two of them.
    """

    @staticmethod
    def forward(ctx, x_BLD: Tensor, gate_KD: Tensor, v_KD: Tensor, features_KD: Tensor | None) -> tuple[Tensor, ...]:
        weights = (gate_KD, v_KD) if features_KD is None else (gate_KD, v_KD, features_KD)
        ctx.save_for_backward(x_BLD, *weights)
        return tuple(F.linear(x_BLD, weight_KD) for weight_KD in weights)

    @staticmethod
    def backward(ctx, *gradients_BLK: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, *weights = ctx.saved_tensors
        rows_NK, x_ND = [g_BLK.flatten(0, -2) for g_BLK in gradients_BLK], x_BLD.flatten(0, -2)
        gx_ND = torch.ops.mixerbench.sum_of_products(rows_NK, weights)
        of_weights = [g_NK.t() @ x_ND for g_NK in rows_NK] + [None] * (3 - len(weights))
        return gx_ND.unflatten(0, x_BLD.shape[:-1]), *of_weights
