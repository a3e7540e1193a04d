"""The logistic function for kernels whose time is that of their instructions, as those of the shell are.

`tl.sigmoid` is a dozen: it treats exponentials and divisors that are no normal numbers, which 1 + exp(-x) never is and
exp(-x) may be taken for zero where it is. This is the chip's own exponential and reciprocal, and nothing else.
"""

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no instructions
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32, within a few units in its last place where |x| is not large."""
    if not COMPILED:
        return tl.sigmoid(x)
    power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2E], tl.float32, True, 1)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + power], tl.float32, True, 1)
