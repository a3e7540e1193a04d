"""What test_kernels.py runs in a process of its own: kernels against plain torch, the figures as JSON.

In Triton's interpreter on the CPU, or else on the GPU.
"""

import dataclasses
import itertools
import json
import math
import os
import sys
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl

from bench import backbone
from bench.check import subject_of
from bench.check.backends import errors, plain, with_skip
from bench.check.verb import of
from bench.compose import make_run, make_where
from bench.kernels import (
    add_norm,
    conv,
    cosine_sums,
    cross_entropy,
    exponential_product,
    grid_product,
    grid_sums,
    low_rank,
    nonuniform,
    scan,
    softmax,
    toeplitz,
)
from bench.kernels.gated_norm import gated_norm
from bench.mixers import lags, vandermonde
from bench.mixers.attention import bounds
from bench.mixers.base import same_segment
from bench.shells.base import short_conv
from bench.tasks.masking import UNUSED
from tests.conftest import built, shrunk

torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DRAW = torch.Generator().manual_seed(0)
FOUND = {}


def random(*shape):
    return torch.randn(shape, generator=DRAW).to(DEVICE)


def compare(name, fast, exact, *inputs):
    """The largest norm of a difference over the norm, of the value and of each input's gradient."""
    results = []
    for way in (fast, exact):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = way(*leaves)
        if not results:
            g = random(*y.shape)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g, allow_unused=True)])
    pairs = [(a, b) for a, b in zip(*results, strict=True) if b is not None]
    FOUND[name] = largest((a - b).norm() / b.norm().clamp(min=1e-9) for a, b in pairs)


def largest(figures):
    """NaN if one is: Python's max may pass over it."""
    return float(torch.tensor([float(figure) for figure in figures]).max())


def segments(packed):
    rows = [[1] * 10 + [2] * 24 + [0] * 4, [1] * 38] if packed else [[1] * 27 + [0] * 11, [1] * 38]
    return torch.tensor(rows, device=DEVICE)


def convolution():
    if INTERPRETED:
        conv.TOKENS = 16  # several stretches in a short row: the interpreter is slow
    for packed, causal, silu in itertools.product((False, True), repeat=3):
        if not INTERPRETED or (packed + causal + silu) % 2:
            if INTERPRETED:
                conv.UNROLLED = 8 if packed else 2
            one_convolution(packed, causal, silu)


def one_convolution(packed, causal, silu):
    s_BL = segments(packed)

    def exact(wide, weight, bias):
        x = wide[..., 40:] * (s_BL > 0)[..., None]
        y = short_conv(x, s_BL, weight, bias, causal, packed)
        return F.silu(y) if silu else y

    def fast(wide, weight, bias):
        return conv.short_conv(wide[..., 40:], s_BL, weight, bias, 6 if causal else 3, packed, silu)

    compare(f"convolution {packed=} {causal=} {silu=}", fast, exact, random(2, 38, 80), random(40, 7), random(40))


def norm():
    for skip in (False, True):
        one_norm(skip, torch.tensor(1.7, device=DEVICE))


def one_norm(skip, scale):
    def fast(y, v, z, w):
        return gated_norm(y, v, z[..., 48:], scale, w, 1e-5, skip) + 0 * v.sum()

    def exact(y, v, z, w):
        return F.rms_norm(y * scale + v * skip, (48,), w, 1e-5) * F.silu(z[..., 48:])

    compare(f"gated norm {skip=}", fast, exact, random(2, 5, 48), random(2, 5, 48), random(2, 5, 96), random(48))


def residual():
    """Both copies of the stream get a gradient, or one; shares of rows are not all full."""
    for rows, programs, width in ((7, 1056, 48), (7, 2, 48), (300, 150, 20)):
        with mock.patch.object(add_norm, "PROGRAMS", programs):
            for both in (True, False):
                one_residual(both, rows, width)


def one_residual(both, rows, width):
    def fast(x, y, w, b):
        outs = add_norm.add_norm(x, y, w, b, 1e-5)
        return torch.cat(outs) if both else outs[0]

    def exact(x, y, w, b):
        out = F.layer_norm(x + y, (width,), w, b, 1e-5)
        return torch.cat((out, out)) if both else out

    given = f"residual {both=} {rows=} programs={add_norm.PROGRAMS}"
    compare(given, fast, exact, random(2, rows, width), random(2, rows, width), random(width), random(width))
    turned = random(2, width, rows).mT  # strides that the operator does not keep
    torch.library.opcheck(add_norm.add_norm, (turned, turned.bfloat16(), *random(2, width), 1e-5))


def product():
    """Rows that one program takes, and longer or wider ones, in shares or not."""
    for length, rank, width, programs in ((100, 5, 6, 512), (38, 40, 70, 512), (130, 100, 70, 512), (280, 5, 6, 1)):
        low_rank.PROGRAMS = programs
        inputs = random(2, length, 2, 3, rank), random(2, length, 3, width)
        for scale in (None, torch.full((), 0.5, device=DEVICE)):
            given = f"low rank {length=} {rank=} {programs=} {scale=!s}"
            compare(given, partial(fast_product, scale), partial(exact_product, scale), *inputs)


def fast_product(scale, qk, v):
    return low_rank.low_rank_product(*qk.unbind(2), v, scale)


def exact_product(scale, qk, v):
    y = torch.einsum("bihr,bjhr,bjhp->bihp", *qk.unbind(2), v)
    return y if scale is None else y + v / scale


def exponentials():
    """Rows in shares or not; several tiles of entries, of terms and of width;
    entries beside others in memory, rows in which a batch shares them, tokens that are left out."""
    kernels = exponential_product
    if INTERPRETED:
        kernels.TOKENS = kernels.WIDE = 16
    for length, rank, width, programs in ((37, 5, 6, 512), (37, 40, 20, 512), (150, 5, 6, 512), (130, 40, 20, 1)):
        kernels.PROGRAMS = programs
        for batch in (1, 2):
            one_exponential(batch, length, rank, width)


def one_exponential(batch, length, rank, width):
    rates, weights = [0.5, 2.0, 11.0], [1.0, 0.7, 3.0]
    scale, real = random(2, length), (torch.rand(2, length, generator=DRAW) > 0.3).float().to(DEVICE)

    def entries(wide):
        return wide.exp().expand(2, -1, -1, -1)[..., 3:].unflatten(-1, (2, rank)).unbind(-2)

    def fast(wide, v):
        return exponential_product.exponential_product(*entries(wide), v[..., 2:], scale, real, rates, weights)

    def exact(wide, v):
        x_BLHAR = torch.stack(entries(wide), 3)
        x_BLHAMR = torch.stack([w**0.5 * torch.exp(-t * x_BLHAR) for t, w in zip(rates, weights, strict=True)], -2)
        q, k = x_BLHAMR.unbind(3)
        numbers = scale[..., None, None], real[..., None, None]
        return torch.einsum("bihmr,bjhmr,bjhp->bihp", q, k, v[..., 2:] * numbers[1]) * numbers[0]

    inputs = random(batch, length, 2, 2 * rank + 3), random(2, length, 2, width + 2)
    compare(f"exponentials {batch=} {length=} {rank=}", fast, exact, *inputs)


SCANS = (
    {},
    {"PROGRAMS": 1, "PROGRAMS_HEARD": 1, "SERIAL": 0, "BLOCK": 64},
    {"PROGRAMS": 4, "PROGRAMS_HEARD": 8, "CHUNK": 32, "WHOLE": 32, "TILE": 16},
)
"""As on a large GPU, a head or few a program; all heads in one, and states carried by programs of their own, in blocks;
uneven parts of the heads, and chunks of four tiles."""


def scans(in_half):
    """Rows of one chunk, full or not, and of more, of which one has a place in its last; documents that end within
    chunks; heads that share c and b or not; both directions, with c and b of their own or not, and one. States that no
    chunk has are NaN, as is all memory that nothing wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    multiply_bf16()
    for length, heads, groups, state, sides, directions, packed in (
        (128, 6, 1, 16, 2, 2, False),
        (100, 5, 1, 16, 1, 2, True),
        (64, 6, 2, 16, 2, 2, True),
        (1, 1, 1, 64, 1, 2, False),
        (129, 4, 2, 16, 1, 1, True),
        (200, 4, 1, 64, 2, 2, False),
        (270, 2, 1, 16, 2, 2, True),
    ):
        for constants in SCANS:
            with mock.patch.dict(vars(scan), constants):
                dtype = torch.bfloat16 if in_half else torch.float32
                one_scan(length, heads, groups, state, sides, directions, packed, dtype, constants)


def one_scan(length, heads, groups, state, sides, directions, packed, dtype, constants):
    """c and b beside others in memory; the exact matrix from sums over whole rows, in fp64."""
    cuts = torch.tensor([[length // 3, length - 5], [70, 71]] if packed else [[length] * 2] * 2, device=DEVICE)
    place_L = torch.arange(length, device=DEVICE)
    segments_BL = 1 + (place_L >= cuts[..., None]).sum(1)
    same_BLL1 = (segments_BL[:, :, None] == segments_BL[:, None])[..., None]

    def fast(v, wide, raw, delta):
        c, b = wide.to(dtype)[..., 3:].unflatten(-1, (2, state)).unbind(-2)
        dt = F.softplus(raw - 3)
        return scan.scan(v.to(dtype), c, b, dt, -dt, delta, segments_BL, packed).float()

    def exact(v, wide, raw, delta):
        v, wide, dt, delta = v.to(dtype).double(), wide.to(dtype).double(), F.softplus(raw.double() - 3), delta.double()
        cb = torch.einsum("bidgn,bjdgn->bijdg", *wide[..., 3:].unflatten(-1, (2, state)).unbind(-2))
        cb = cb.expand(-1, -1, -1, max(sides, directions), -1).repeat_interleave(heads // groups, -1)
        sums = -dt.cumsum(1)
        back = sums + dt  # without a place's own
        apart = place_L[:, None, None] - place_L[:, None]  # of the reading place from the written one, LL1
        logs = [sums[:, :, None, 0] - sums[:, None, :, 0], back[:, None, :, -1] - back[:, :, None, -1]]
        matrix = torch.diag_embed(delta.transpose(1, 2)).permute(0, 2, 3, 1)
        for d in range(directions):
            kept = same_BLL1 & (apart * (1 - 2 * d) > 0)
            entry = cb[..., d, :] * dt[:, None, :, d] * logs[d].masked_fill(~kept, -math.inf).exp()
            matrix = matrix + entry
        return torch.einsum("bijh,bjhp->bihp", matrix, v).float()

    inputs = random(2, length, heads, 5), random(2, length, sides, groups, 2 * state + 3)
    name = f"scan {length=} {heads=} {groups=} {state=} {sides=} {directions=} {packed=} {dtype=} {constants=}"
    compare(name, fast, exact, *inputs, random(2, length, directions, heads), random(2, length, heads))


def cosines(*cases):
    """Waves that turn by up to 0.4 from place to place, as on a grid, or hardly; more terms than a thread has."""
    for rank, size in cases:
        one_sum(rank, size)


def one_sum(rank, size):
    """Numbers beside others in memory; phases in fp64."""

    def turns(wide):
        return 0.4 * torch.cat([wide[..., :-1].sin(), 1e-3 * wide[..., -1:].tanh()], -1)

    def fast(wide):
        return cosine_sums.sums_of_steps(torch.sin(math.pi * turns(wide))[..., rank:], size, torch.float32)

    def exact(wide):
        phases = turns(wide)[..., rank:].double()[..., None] * torch.arange(size, device=DEVICE)
        return torch.cos(2 * math.pi * phases).sum(-2).permute(0, 2, 3, 1).float()

    compare(f"cosines {rank=} {size=}", fast, exact, random(2, 37, 2, 2 * rank))


def differences():
    """Of several tiles each way and of a whole row, one head or more, C and D of each row or of one for all, v / scale
    added or not; what is on padding does not count."""
    tiles = dict.fromkeys(("TOKENS", "POINTS", "WIDE", "SHORT_TOKENS"), 16) | {"TOKENS_OUTER": 32}  # half in fp32
    tiles = tiles if INTERPRETED else {}
    cases = (2, 3, 37, 48, 20, None), (1, 3, 40, 16, 5, 0.7), (2, 1, 9, 16, 16, 0.7), (2, 1, 37, 32, 16, None)
    for short, case in itertools.product((0, 128), cases):
        with mock.patch.dict(vars(grid_product), tiles | {"SHORT": short}):
            one_difference(short, *case, (2, 9))
    with mock.patch.dict(vars(grid_product), tiles | {"SHORT": 0}):  # what is seen ends right behind the edge of a tile
        one_difference(0, 1, 1, 70, 48, 16, None, (3, 17))


def one_difference(short, batch, heads, length, size, width, scale, band):
    place, (spacing, reach) = torch.arange(length, device=DEVICE), band
    near = (place[:, None] + 1 - spacing * torch.arange(size, device=DEVICE)).abs() < reach
    w, r = random(length, size) * near, random(2, length).abs() * (place < length - 3)
    padding, scale = (r == 0)[..., None, None], None if scale is None else torch.tensor(scale, device=DEVICE)

    def fast(c, v):
        v = v[..., 2:]
        if scale is not None:
            return grid_product.grid_product(c, w, v, r, scale, *band)
        y = grid_product.grid_product(c, w, v.masked_fill(padding, math.nan), r, scale, *band)
        y.register_hook(lambda g: g.masked_fill(padding, math.nan))
        return y

    def exact(c, v):
        (c, d), v = c.expand(2, -1, -1, -1).chunk(2, 1), v[..., 2:]
        m = torch.einsum("bhki,jk->bhij", c, w) - torch.einsum("ik,bhkj->bhij", w, d)
        y = torch.einsum("bi,bhij,bj,bjhp->bihp", r, m, (r > 0).float(), v)
        return y if scale is None else y + v / scale

    inputs = random(batch, 2 * heads, size, length), random(2, length, heads, 2 + width)
    compare(f"differences {short=} {batch=} {heads=} {length=} {size=} {width=}", fast, exact, *inputs)
    way, band = (grid_product.short_product, ()) if short else (grid_product.long_product, band)
    # Among others, that the strides are those that a compiler is told.
    torch.library.opcheck(way, (inputs[0], w, inputs[1][..., 2:], r, scale, *band))


def long():
    """Frequencies up to half a cycle a place, next to mirror images at both ends; of each row or one for all."""
    for batch, bound, size in ((1, 0.05, 70), (2, 1 / 16, 70), (2, 1 / 16, 9)):
        one_long(batch, bound, 8, size)


def one_long(batch, bound, spacing, size):
    def frequencies(wide):  # some at either end
        return bound * wide.clamp(-1, 1).sin() / math.sin(1)

    def waves(wide):
        turns = frequencies(wide).double()[..., None] * (spacing * torch.arange(size, device=DEVICE))
        return torch.cos(2 * math.pi * turns).sum(-2).float().expand(2, -1, -1, -1)

    def fast(wide, x, s):
        f, x, s = frequencies(wide), x[..., 2:], s[..., 2:]
        y = nonuniform.apply_nonuniform(f, s, spacing)
        return torch.cat([y, nonuniform.gather_nonuniform(f, x, spacing, size).transpose(1, 2)], 1)

    def exact(wide, x, s):
        y = torch.einsum("blhk,bhkp->blhp", waves(wide), s[..., 2:])
        return torch.cat([y, torch.einsum("blhk,blhp->bkhp", waves(wide), x[..., 2:])], 1)

    inputs = random(batch, 12, 2, 3), random(2, 12, 2, 8), random(2, 2, size, 8)
    compare(f"long {batch=} {bound=} {size=}", fast, exact, *inputs)
    f, x, s = frequencies(inputs[0]), *inputs[1:]
    torch.library.opcheck(nonuniform.apply_nonuniform, (f.detach(), s, spacing))  # the strides that a compiler is told
    torch.library.opcheck(nonuniform.gather_nonuniform, (f.detach(), x, spacing, size))


def grid():
    """A band of several tiles both ways, and rows shorter than a tile."""
    if INTERPRETED:
        grid_sums.PLACES = grid_sums.POINTS = grid_sums.SEEN = 16
    for length, spacing, reach, width in ((150, 2, 9, 5), (40, 7, 20, 20), (11, 3, 13, 3)):
        one_grid(length, spacing, torch.rand(reach, generator=DRAW).to(DEVICE), width)


def one_grid(length, spacing, weight, width):
    size, reach = (length + len(weight)) // spacing + 1, len(weight)
    j, k = torch.arange(1, length + 1, device=DEVICE)[:, None], torch.arange(size, device=DEVICE)
    table = F.pad(weight, (0, length + size * spacing))
    matrix = table[(j - k * spacing).abs()] + table[j + k * spacing] * (k > 0)

    def fast(v):
        v = v[..., 4:]
        u = grid_sums.to_grid(v, weight, spacing, size)
        return torch.cat([u.transpose(1, 2), grid_sums.from_grid(u, weight, spacing, length)], 1)

    def exact(v):
        u = torch.einsum("jk,bjhp->bkhp", matrix, v[..., 4:])
        return torch.cat([u, torch.einsum("jk,bkhp->bjhp", matrix, u)], 1)

    compare(f"grid {length=} {spacing=} {reach=}", fast, exact, random(2, length, 2, width + 4))


def tiles():
    """Several tiles both ways and a last one that is cut, rows that end early, shared filters, channels beside others
    in memory."""
    if INTERPRETED:
        toeplitz.READ, toeplitz.WRITTEN, toeplitz.PLACES, toeplitz.CHANNELS = 32, 16, 16, 16
    for length, filters, causal, width in ((75, 2, False, 20), (75, 1, True, 5), (9, 2, False, 3)):
        one_toeplitz(length, filters, causal, width)


def one_toeplitz(length, filters, causal, width):
    count, at = torch.tensor([length, length * 2 // 3], device=DEVICE), torch.arange(length, device=DEVICE)
    seen = (at < count[:, None]).float()

    def fast(v, w):
        if causal:
            return toeplitz.toeplitz_product(v[..., 3:], w, count, True, False)
        return toeplitz.toeplitz(v[..., 3:], w, count)

    def exact(v, w):
        matrix = lags.spread(w * (torch.arange(1 - length, length, device=DEVICE) >= 0) if causal else w)
        return lags.apply(matrix * seen[:, None, :, None] * seen[:, None, None], v[..., 3:])

    inputs = random(2, length, 2, width + 3), random(filters, 2, 2 * length - 1)
    compare(f"toeplitz {length=} {filters=} {causal=}", fast, exact, *inputs)


def attention():
    """One tile, several with a last one that is cut; padding that holds anything, a row of it, documents that end
    within tiles."""
    if INTERPRETED:
        softmax.QUERIES, softmax.KEYS, softmax.OWN, softmax.OTHER, softmax.WHOLE = 32, 16, 32, 16, 64
    for length, rank, width, packed in ((70, 5, 6, False), (70, 16, 20, True), (29, 7, 16, False), (29, 4, 5, True)):
        one_attention(length, rank, width, packed)


def one_attention(length, rank, width, packed):
    n = length // 2
    rows = [[1] * (n - 3) + [2] * (length - n) + [0] * 3, [1] * 3 + [2] * (length - 3)] if packed else []
    rows += [[1] * length, [1] * (n + 2) + [0] * (length - n - 2), [0] * length]
    segments_BL = torch.tensor(rows, device=DEVICE)
    padding_BL1 = (segments_BL == 0)[..., None]

    def fast(wide, v):
        wide, v = wide.masked_fill(padding_BL1, math.nan), v.masked_fill(padding_BL1[..., None], math.nan)
        x = wide[..., 3:].unflatten(-1, (2, 2, rank))
        y = softmax.softmax_product(x, v[..., 2:], *bounds(segments_BL, packed), packed)[0]
        y.register_hook(lambda g: g.masked_fill(padding_BL1[..., None], math.nan))
        return y

    def exact(wide, v):
        q, k = wide[..., 3:].unflatten(-1, (2, 2, rank)).transpose(1, 3).unbind(2)
        same_B1LL = same_segment(segments_BL)
        s_BHLL = (q @ k.mT / rank**0.5).masked_fill(~same_B1LL, -1e9)
        return ((s_BHLL.softmax(-1) * same_B1LL) @ v[..., 2:].transpose(1, 2)).transpose(1, 2)

    inputs = 3 * random(len(rows), length, 4 * rank + 3), random(len(rows), length, 2, width + 2)
    compare(f"attention {length=} {rank=} {packed=}", fast, exact, *inputs)


def model(name, changes):
    """A whole model with fused shells and kernels in its mixers, and again on its plain backends, against itself
    without."""
    made, task = built(shrunk(make_run("quick_recall", name, changes, 0, 0)), backend="triton")
    made.to(DEVICE)
    for _, scale in made.parts():
        scale.fill_(0.7)
    batch = {key: x.to(DEVICE) for key, x in task.example(4).items()}
    parameters = [p for _, p in sorted(made.named_parameters())]

    def gradients():
        loss = task.loss(made(batch), batch)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with backbone.plain(made):
        exact = gradients()
    backbone.fuse(made)
    fast = gradients()
    with backbone.plain(made):
        again = gradients()
    FOUND[f"{name} model"] = largest(
        (a - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(fast, exact, strict=True)
    )
    FOUND[f"{name} model, differs"] = float(all(torch.equal(a, b) for a, b in zip(fast, exact, strict=True)))
    FOUND[f"{name} model, plain again"] = float(not all(torch.equal(a, b) for a, b in zip(again, exact, strict=True)))


def stream(name, changes):
    """A whole model under autocast whose layers hand on a copy of the stream: value and gradients are as near to plain
    layers in fp32, within a factor, as those of plain layers under autocast are, each parameter's for itself."""
    multiply_bf16()
    run = shrunk(make_run("quick_recall", name, changes | {"protocol.backbone.norm": "post"}, 0, 0))
    two = dataclasses.replace(run.protocol, backbone=dataclasses.replace(run.protocol.backbone, layers=2))
    made, task = built(dataclasses.replace(run, protocol=two), backend="triton")
    made.to(DEVICE)
    batch = {key: x.to(DEVICE) for key, x in task.example(4).items()}
    parameters = [p for _, p in sorted(made.named_parameters())]

    def gradients(autocast):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss, copied = task.loss(made(batch), batch), made.layers[1].hands_on(DEVICE)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)], copied

    with backbone.plain(made):
        (exact, _), (usual, none) = gradients(False), gradients(True)
    backbone.fuse(made)
    for layer in made.layers:  # traced as in training
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    fast, copied = gradients(True)
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():  # traced anew
        apart = (task.loss(made(batch), batch) - fast[0]).abs()
    FOUND[f"{name} stream, otherwise without gradients"] = float(not apart < 1e-3 * fast[0])
    FOUND[f"{name} stream, a copy or none in the wrong place"] = float(none or not copied)
    bounds = [4 * (y - x).norm() + 0.004 * x.norm() for x, y in zip(exact, usual, strict=True)]
    far = largest((x - y).norm() / bound for x, y, bound in zip(exact, fast, bounds, strict=True))
    FOUND[f"{name} stream, far"] = float(not far < 1)


def losses(in_half):
    """Rows of one block and of several, of which the last is cut; unused rows, which hold anything; large logits."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing wrote is NaN
    dtype = torch.bfloat16 if in_half else torch.float32
    for rows, classes, block, size in ((7, 37, 64, 1), (9, 301, 64, 3), (5, 256, 64, 1e4), (3, 1, 64, 1)):
        with mock.patch.multiple(cross_entropy, BLOCK=block, BLOCK_BACK=block // 2):
            one_loss(rows, classes, size, dtype)


def one_loss(rows, classes, size, dtype):
    """Logits beside others in memory."""
    labels_N = torch.randint(classes, (rows,), generator=DRAW)
    labels_N[1::3] = UNUSED
    labels_N[0] = classes - 1
    labels_N, nowhere = labels_N.to(DEVICE), torch.full((rows,), UNUSED, device=DEVICE)
    anything_N1 = torch.where(labels_N == UNUSED, math.nan, 0.0)[:, None]

    def fast(wide):
        return torch.ops.mixerbench.cross_entropy((wide + anything_N1).to(dtype)[:, 3:], labels_N, UNUSED)[0]

    def exact(wide):
        x_NC = wide.to(dtype)[:, 3:].double()
        return F.cross_entropy(x_NC, labels_N, ignore_index=UNUSED, reduction="sum").float()

    name, wide = f"losses {rows=} {classes=} {size=} {dtype=}", size * random(rows, classes + 3)
    compare(name, fast, exact, wide)
    x_NC = wide.to(dtype)[:, 3:].detach().requires_grad_()
    outside = cross_entropy.cross_entropy(x_NC, torch.full_like(labels_N, classes), UNUSED)[0]
    FOUND[f"{name}, of a label that is no class"] = float(not outside.isnan())
    found = [loss_and_gradient(x_NC, labels_N) for _ in range(2)]
    FOUND[f"{name}, not the same again"] = float(not all(map(torch.equal, *found)))
    FOUND[f"{name}, all unused"] = largest(x.abs().max() for x in loss_and_gradient(x_NC + math.nan, nowhere))
    torch.library.opcheck(torch.ops.mixerbench.cross_entropy.default, (x_NC, labels_N, UNUSED))


def loss_and_gradient(x_NC, labels_N):
    """Of a loss that counts -2.5 times."""
    loss, _ = cross_entropy.cross_entropy(x_NC, labels_N, UNUSED)
    return [loss.detach(), *torch.autograd.grad(-2.5 * loss, x_NC)]


def vocabulary():
    """A masked LM's loss by the operator, as it is and in a compiled graph; what is evaluated never is."""
    _, task = built(shrunk(make_run("mini_mlm", "identity", {"mixer.heads": 2}, 0, 0)))
    batch = {key: x.to(DEVICE) for key, x in task.example(2).items()}
    batch["labels"][:, 1::4] = UNUSED
    outputs_BTC = 3 * random(*batch["labels"].shape, task.spec().outputs)
    graph = torch.compile(task.loss, backend="aot_eager", fullgraph=True)

    def loss(way, fused, x):
        task.fused = fused
        return way(x, batch)

    for name, way in (("", task.loss), (" compiled", graph)):
        compare("a masked LM's loss" + name, partial(loss, way, True), partial(loss, task.loss, False), outputs_BTC)
    outcomes, calls = [], []
    for task.fused in (True, False):
        with mock.patch.object(torch.ops.mixerbench, "cross_entropy") as operator:
            for way in (task.outcomes, task.loss):
                outcomes.append(way(outputs_BTC, batch))
                calls.append(operator.call_count)
    FOUND["other calls"] = float(calls != [0, 1, 0, 0])
    FOUND["other outcomes"] = float(not all(map(np.array_equal, *(x.values() for x in outcomes[::2]))))


def exact_features():
    """Channels that autocast must not touch, by a fused shell: as a plain one has them, though by another way."""
    made, _ = built(shrunk(make_run("quick_recall", "vandermonde", {"mixer.sam": True}, 0, 0)), backend="triton")
    made.to(DEVICE)
    shell, segments = made.layers[0].shell, torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
    x = random(2, 20, shell.width) * torch.logspace(-4, 2, shell.width, device=DEVICE)

    def channels():
        with torch.autocast(DEVICE, torch.bfloat16):
            return shell.exact(x, segments).detach()

    with backbone.plain(made):
        exact = channels()
    backbone.fuse(made)
    FOUND["exact features"] = float((channels() - exact).norm() / exact.norm())
    FOUND["exact features, the same way"] = float(torch.equal(channels(), exact))


def multiply_bf16():
    """The interpreter keeps bf16 as integers, and multiplies those: its products are mended."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, *more):
        return product(builder, widened(a), widened(b), *more)

    InterpreterBuilder.create_dot = create_dot


def half(name, changes):
    """As `mixer`, in bf16."""
    multiply_bf16()
    mixer(name, changes, in_half=True)


def mixer(name, changes, in_half=False):
    """A mixer's backend against its own matrix in fp64, as `check` holds it to on a GPU."""
    if INTERPRETED:
        scan.CHUNK, scan.WHOLE = 16, 32  # several chunks in a short row: the interpreter is slow
    for label, (make, declared) in of(name, changes, make_where({"where.device": "cpu"})).items():
        ways = dict(declared.backends)
        subject = subject_of(make, declared, full=False, device=DEVICE)
        for packed in (False, True):
            given = subject, ways["triton"], packed, 37 if INTERPRETED else 300, in_half
            FOUND[f"{label} {packed=}"] = largest([*errors(*given, plain).values(), *with_skip(*given).values()])


def long_mixer(name, changes):
    with mock.patch.object(vandermonde, "LONG", 0):
        mixer(name, changes)


for call in json.loads(sys.argv[1]):
    globals()[call[0]](*call[1:])
print(json.dumps(FOUND))
