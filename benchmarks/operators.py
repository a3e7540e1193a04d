"""What kernels.py times and compiled.py compiles: operators at the shapes of a layer, and settings worth a try.

A setting changes constants at the head of the operator's file; the key `way` instead names another way to compute the
same, such as by Fourier transforms. The first setting is the operator as it is.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import (
    add_norm,
    conv,
    cosine_sums,
    cross_entropy,
    exact_product,
    exponential_product,
    gated_norm,
    grid_product,
    grid_sums,
    low_rank,
    nonuniform,
    scan,
    softmax,
    toeplitz,
)
from bench.mixers import lags
from bench.mixers.attention import bounds
from bench.mixers.exponentials import exponentials
from bench.mixers.interpolation import grid
from bench.mixers.scan import Terms, chunked_scan
from bench.shells.base import ExactProduct, short_conv

WIDTH, EPS, BOUND = 128, 1e-5, 0.05  # of a head; of the norm; of Vandermonde's frequencies


@dataclass(frozen=True)
class Size:
    batch: int
    length: int
    heads: int
    device: str
    dtype: torch.dtype  # of what is not `wide`

    def draw(self, *shape: int, wide: bool = False) -> Tensor:
        dtype = torch.float32 if wide else self.dtype
        return torch.randn(shape, device=self.device, dtype=dtype).requires_grad_()

    def rows(self, *rest: int, wide: bool = False) -> Tensor:
        return self.draw(self.batch, self.length, *rest, wide=wide)

    @property
    def segments(self) -> Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.int64, device=self.device)


@dataclass
class Case:
    """`ways` and `exact` take the same leaves, which all have gradients."""

    module: ModuleType
    leaves: list[Tensor]
    exact: Callable
    ways: dict[str, Callable]
    flops: int = 0  # of tensor cores, forward and backward

    @contextmanager
    def under(self, values: dict) -> Iterator[None]:
        usual = {key: getattr(self.module, key) for key in values if key != "way"}
        for key in usual:
            setattr(self.module, key, values[key])
        try:
            yield
        finally:
            for key, value in usual.items():
                setattr(self.module, key, value)


@dataclass(frozen=True)
class Entry:
    make: Callable[[Size], Case]
    length: int
    settings: list[dict] = field(default_factory=list)


def step(way: Callable, leaves: list[Tensor], gradient: Tensor | None = None) -> list[Tensor]:
    """The value and all gradients for a gradient that comes in: by default waves that are the same in every dtype."""
    y = way(*leaves)
    if gradient is None:
        gradient = torch.arange(y.numel(), device=y.device).remainder(97).sub(48).div(32).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def convolution(heads: int, size: Size) -> Case:
    channels, segments_BL = max(1, heads * size.heads // 12) * WIDTH, size.segments

    def exact(x, weight, bias):
        return F.silu(short_conv(x, segments_BL, weight, bias, False, False))

    def fast(x, weight, bias):
        return conv.short_conv(x, segments_BL, weight, bias, 3, False, True)

    taps = size.draw(channels, 7, wide=True), size.draw(channels, wide=True)
    return Case(conv, [size.rows(channels), *taps], exact, {"": fast})


def norm(size: Size) -> Case:
    scale, channels = torch.tensor(1.3, device=size.device), size.heads * WIDTH

    def exact(y, v, z, w):
        return F.rms_norm(y * scale + v, (channels,), w, EPS) * F.silu(z)

    def fast(y, v, z, w):
        return gated_norm.gated_norm(y, v, z, scale, w, EPS, True)

    return Case(
        gated_norm, [*(size.rows(channels) for _ in range(3)), size.draw(channels, wide=True)], exact, {"": fast}
    )


def residual(size: Size) -> Case:
    """The copy's gradient is a tensor of zeros, which are written and read as any gradient would be."""
    width = size.heads * WIDTH // 2

    def exact(x, y, w, b):
        return F.layer_norm(x + y, (width,), w, b, EPS)

    def fast(x, y, w, b):
        return add_norm.add_norm(x, y, w, b, EPS)[0]

    weights = size.draw(width, wide=True), size.draw(width, wide=True)
    return Case(add_norm, [size.rows(width, wide=True), size.rows(width), *weights], exact, {"": fast})


def product(rank: int, size: Size) -> Case:
    def exact(q, k, v):
        return torch.einsum("bihr,bhrp->bihp", q, torch.einsum("bjhr,bjhp->bhrp", k, v))

    leaves = [size.rows(size.heads, rank), size.rows(size.heads, rank), size.rows(size.heads, WIDTH)]
    return Case(low_rank, leaves, exact, {"": low_rank.low_rank_product})


def both_ways(width: int, state: int, size: Size) -> Case:
    segments_BL, heads = size.segments, size.heads * WIDTH // width

    def terms(c, b, raw, delta):
        dt = F.softplus(raw.float() - 3)
        return c, b, dt, -dt, delta.float()

    def exact(v, c, b, raw, delta):
        return chunked_scan(v, Terms(*terms(c, b, raw, delta)), segments_BL, False)

    def fast(v, c, b, raw, delta):
        return scan.scan(v, *terms(c, b, raw, delta), segments_BL, False)

    pair = [size.rows(2, 1, state) for _ in range(2)]
    return Case(scan, [size.rows(heads, width), *pair, size.rows(2, heads), size.rows(heads)], exact, {"": fast})


def tiles(size: Size) -> Case:
    """Beside tiles: by Fourier transforms, of places or of blocks, and by the matrix itself where it is short."""
    count_B = torch.full((size.batch,), size.length, device=size.device)
    w = size.draw(size.batch, size.heads, 2 * size.length - 1, wide=True)
    ways = {
        "": lambda v, w: toeplitz.toeplitz(v, w, count_B),
        "fourier": lambda v, w: lags.convolve(w, v),
        "blocks": torch.compile(lambda v, w: lags.by_blocks(w, v), dynamic=False),
        "matrix": lambda v, w: lags.apply(lags.spread(w.to(v.dtype)), v),
    }
    exact = ways["matrix" if size.length < 4096 else "fourier"]
    flops = 6 * size.batch * size.heads * WIDTH * size.length**2
    return Case(toeplitz, [size.rows(size.heads, WIDTH), w], lambda v, w: exact(v, w), ways, flops)


def attention(rank: int, size: Size) -> Case:
    """Beside tiles: torch's fused attention with the mask that padding asks for, and as it is for rows without any."""
    segments_BL, heads = size.segments, size.heads
    seen = bounds(segments_BL, False)

    def fused(x, v, mask):
        q, k = x.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask).transpose(1, 2)

    ways = {
        "": lambda x, v: softmax.softmax_product(x, v, *seen, False)[0],
        "masked": lambda x, v: fused(x, v, (segments_BL > 0)[:, None, None]),
        "unmasked": lambda x, v: fused(x, v, None),
    }
    pairs = size.length * size.length * size.batch * heads
    flops = 2 * pairs * (4 * rank + 3 * WIDTH)  # of one pass each way: scores twice
    return Case(softmax, [size.rows(2, heads, rank), size.rows(heads, WIDTH)], ways["unmasked"], ways, flops)


def cosines(size: Size) -> Case:
    """Of two sets of frequencies a head."""
    points, found = grid(BOUND), size.rows(2 * size.heads, 16, wide=True)
    spacing, places = points.spacing, points.size(size.length)

    def exact(x):
        at = 2 * math.pi * spacing * torch.arange(places, device=x.device)
        f = (BOUND * x.tanh()).double()
        return sum(torch.cos(f[..., d, None] * at).float() for d in range(16)).permute(0, 2, 3, 1)

    def fast(x):
        return cosine_sums.cosine_sums(BOUND * x.tanh(), spacing, places, size.draw(1).dtype)

    return Case(cosine_sums, [found], exact, {"": fast})


def differences(size: Size) -> Case:
    points = grid(BOUND)
    w_LK = points.matrix(size.length, torch.device(size.device)).to(size.dtype)
    columns = size.draw(size.batch, 2 * size.heads, w_LK.shape[1], size.length)
    r_BL = size.segments.float() * size.length**-0.5

    def exact(c, v):
        (c_BHKL, d_BHKL), w_LM = c.chunk(2, 1), w_LK.to(v.dtype)
        y = torch.einsum("bhki,bhkp->bihp", c_BHKL, torch.einsum("jk,bjhp->bhkp", w_LM, v))
        y = y - torch.einsum("ik,bhkp->bihp", w_LM, torch.einsum("bhkj,bjhp->bhkp", d_BHKL, v))
        return r_BL[..., None, None].to(v.dtype) * y

    def fast(c, v):
        return grid_product.grid_product(c, w_LK, v, r_BL, None, points.spacing, points.reach)

    return Case(grid_product, [columns, size.rows(size.heads, WIDTH)], exact, {"": fast})


def exact(size: Size) -> Case:
    """Of a layer's features that autocast must not touch; its gradients are products of bf16."""
    width, channels = 6 * WIDTH, 32 * size.heads
    leaves = [size.rows(width, wide=True), size.draw(channels, width, wide=True)]
    ways = {"": partial(multiplied, True), "fp32": partial(multiplied, False)}
    return Case(exact_product, leaves, lambda x, w: (x.double() @ w.double().t()).float(), ways)


def multiplied(fused: bool, x: Tensor, w: Tensor) -> Tensor:
    return ExactProduct.apply(x.detach(), x.to(torch.bfloat16), w, fused)


def losses(size: Size) -> Case:
    """Of a masked LM, with a vocabulary of 30,528 for 12 heads: a row of logits for five tokens in eight, which makes
    10,240 of 16,384. Beside it what torch.compile makes of torch's own."""
    classes, unused = 2544 * size.heads, -100
    place_N = torch.arange(size.batch * size.length * 5 // 8, device=size.device)
    labels_N = torch.where(place_N % 16 == 5, unused, place_N * 7919 % classes)

    def exact(x):
        return F.cross_entropy(x.float(), labels_N, ignore_index=unused, reduction="sum")

    ways = {
        "": lambda x: cross_entropy.cross_entropy(x, labels_N, unused)[0],
        "compiled": torch.compile(exact, dynamic=False),
    }
    return Case(cross_entropy, [size.draw(len(place_N), classes)], exact, ways)


def nonuniforms(size: Size) -> Case:
    """Both products with cosines at a grid's points, one after the other."""
    points, found = grid(BOUND), size.rows(size.heads, 16, wide=True)
    spacing, places = points.spacing, points.size(size.length)

    def exact(x, v):
        at = 2 * math.pi * spacing * torch.arange(places, device=x.device)
        f = (BOUND * x.tanh()).double()
        c = sum(torch.cos(f[..., d, None] * at).to(v.dtype) for d in range(16))
        return torch.einsum("blhk,bhkp->blhp", c, torch.einsum("blhk,blhp->bhkp", c, v))

    def fast(x, v):
        f = BOUND * x.tanh()
        states = nonuniform.gather_nonuniform(f, v, spacing, places)
        return nonuniform.apply_nonuniform(f, states, spacing)

    return Case(nonuniform, [found, size.rows(size.heads, WIDTH)], exact, {"": fast})


def grids(size: Size) -> Case:
    points = grid(BOUND)
    weight_O, places = points.weights(torch.device(size.device)), points.size(size.length)

    def exact(v):
        j = torch.arange(1, size.length + 1, device=v.device)[:, None]
        k = torch.arange(places, device=v.device) * points.spacing
        table = F.pad(weight_O, (0, int(size.length + places * points.spacing)))
        m = table[(j - k).abs()] + table[j + k] * (k > 0)
        return torch.einsum("jk,bkhp->bjhp", m, torch.einsum("jk,bjhp->bkhp", m, v))

    def fast(v):
        u = grid_sums.to_grid(v, weight_O, points.spacing, places)
        return grid_sums.from_grid(u, weight_O, points.spacing, size.length)

    return Case(grid_sums, [size.rows(size.heads, WIDTH)], exact, {"": fast})


def exponential(size: Size) -> Case:
    """Beside features made on the chip: features written by torch, then their product."""
    rates, weights = (list(x) for x in zip(*exponentials(4.0), strict=True))
    ones_BL = size.segments.float()

    def features(x, dtype):
        return torch.cat([w**0.5 * torch.exp(-t * x) for t, w in zip(rates, weights, strict=True)], -1).to(dtype)

    def exact(a, b, v):
        q, k = features(a, v.dtype), features(b, v.dtype)
        return torch.einsum("bihk,bhkp->bihp", q, torch.einsum("bjhk,bjhp->bhkp", k, v))

    ways = {
        "": lambda a, b, v: exponential_product.exponential_product(a, b, v, ones_BL, ones_BL, rates, weights),
        "features": lambda a, b, v: low_rank.low_rank_product(features(a, v.dtype), features(b, v.dtype), v),
    }
    nodes = [size.rows(size.heads, 16, wide=True).detach().exp().requires_grad_() for _ in range(2)]
    return Case(exponential_product, [*nodes, size.rows(size.heads, WIDTH)], exact, ways)


def each(**values: tuple) -> list[dict]:
    """The operator as it is, then one change at a time."""
    return [{}, *({key: value} for key, tried in values.items() for value in tried)]


ROWS = [
    *each(TOKENS=(128,), TILE=(128,), WIDE=(64,), WARPS=(8,)),
    {"TOKENS": 128, "TILE": 128, "WARPS": 8},
]
SCANS = each(
    PROGRAMS=(512,),
    PROGRAMS_HEARD=(256,),
    SERIAL=(0,),
    CHUNK=(128,),
    STAGES=(3,),
    STAGES_BACK=(2,),
    STAGES_CARRIED=(2,),
)
WHOLE_SCANS = each(WHOLE=(64,), TILE=(32, 128), PROGRAMS=(512,), WARPS=(8,), STAGES_WHOLE=(2,))
TILES = [
    *each(READ=(128,), WRITTEN=(128,), WARPS=(4,), STAGES=(4,), PLACES=(32, 128), WARPS_BACK=(8,), STAGES_BACK=(3,)),
    {"CHANNELS_BACK": 128, "STAGES_BACK": 2},
    {"PLACES": 128, "WARPS_BACK": 8, "STAGES_BACK": 3},
]
SOFTMAX = [
    {},
    {"QUERIES": 128, "WARPS": 8},
    {"OWN": 64, "WARPS_BACK": 4},
    {"KEYS": 32, "OWN": 64, "OTHER": 32, "WARPS_BACK": 4},
    {"STAGES": 4},
    {"STAGES": 2, "STAGES_BACK": 2},
    {"way": "masked"},
    {"way": "unmasked"},
]
EXPONENTIALS = [*each(TOKENS=(32, 128), STAGES=(2,), PROGRAMS=(1024,)), {"way": "features"}]
SUMS = [
    *each(TOKENS=(64,), UNROLLED=(4, 8), UNROLLED_BACK=(4, 8)),
    {"TOKENS": 64, "WARPS": 2},
    {"TOKENS": 128, "WARPS": 4},
]
DIFFERENCES = [
    *each(
        TOKENS=(128,), POINTS=(32,), WARPS_GATHER=(8,), WARPS_APPLY=(8,), WARPS_OUTER=(4,),
        STAGES_GATHER=(2,), STAGES_APPLY=(1, 3), STAGES_OUTER=(2, 3),
    ),
    {"TOKENS": 128, "WARPS_GATHER": 8, "WARPS_APPLY": 8},
    {"TOKENS": 128, "WARPS_GATHER": 8, "WARPS_APPLY": 8, "STAGES_GATHER": 2, "STAGES_APPLY": 1},
    {"TOKENS": 32, "STAGES_APPLY": 3},
    {"TOKENS_OUTER": 64, "WARPS_OUTER": 4},
    {"TOKENS_OUTER": 64, "WARPS_OUTER": 4, "STAGES_OUTER": 2},
]  # fmt: skip
PRODUCTS = each(NUMBERS=(512, 2048, 4096), TERMS=(32, 128), FREQUENCIES=(32, 64), WARPS=(2, 8))
LOSSES = [
    *each(BLOCK=(2048, 8192), WARPS=(2, 8), STAGES=(2, 3), BLOCK_BACK=(2048, 8192), WARPS_BACK=(2, 8)),
    {"BLOCK": 2048, "WARPS": 4, "BLOCK_BACK": 2048, "WARPS_BACK": 4},
    {"BLOCK": 8192, "WARPS": 8, "BLOCK_BACK": 8192, "WARPS_BACK": 8},
    {"BLOCK": 16384, "WARPS": 16, "BLOCK_BACK": 16384, "WARPS_BACK": 16},
    {"BLOCK": 32768, "WARPS": 32, "BLOCK_BACK": 32768, "WARPS_BACK": 32},
    {"way": "compiled"},
]  # fmt: skip
CASES = {
    "convolution 1536": Entry(partial(convolution, 12), 128, each(
        TOKENS=(32, 128), CHANNELS=(128, 512), UNROLLED=(4, 16), FOUR=(64,), SHARES=(16, 64)
    )),
    "convolution 384": Entry(partial(convolution, 3), 128, each(TOKENS=(32, 128), CHANNELS=(128,))),
    "gated norm": Entry(norm, 128, [
        *each(PROGRAMS=(660, 2048), PER_WARP=(256,), STAGES=(1, 2, 4)), {"PROGRAMS": 2048, "STAGES": 1}
    ]),
    "residual": Entry(residual, 128, each(PROGRAMS=(528, 1056), PER_WARP=(128, 512), STAGES=(1, 2, 4))),
    "scan state 16": Entry(partial(both_ways, 128, 16), 2048, SCANS),
    "scan state 64": Entry(partial(both_ways, 64, 64), 2048, SCANS),
    "scan state 16 at 128": Entry(partial(both_ways, 128, 16), 128, WHOLE_SCANS),
    "scan state 64 at 128": Entry(partial(both_ways, 64, 64), 128, WHOLE_SCANS),
    "scan state 64 at 8192": Entry(partial(both_ways, 64, 64), 8192, each(SERIAL=(128,), BLOCK=(512, 4096))),
    "scan state 256 large": Entry(partial(both_ways, 128, 256), 2048, [{}]),
    "scan state 64 narrow": Entry(partial(both_ways, 16, 64), 128, [{}]),
    "toeplitz 128": Entry(tiles, 128, [*TILES, {"way": "matrix"}]),
    "toeplitz 2048": Entry(tiles, 2048, [*TILES, {"way": "fourier"}, {"way": "blocks"}]),
    "toeplitz 8192": Entry(tiles, 8192, [{}, {"READ": 128}, {"way": "fourier"}, {"way": "blocks"}]),
    "attention 128": Entry(partial(attention, 16), 128, [
        *SOFTMAX, {"WHOLE": 64}, {"WHOLE": 64, "OWN": 64, "WARPS_BACK": 4}
    ]),
    "attention 2048": Entry(partial(attention, 16), 2048, SOFTMAX),
    "attention 8192": Entry(partial(attention, 64), 8192, SOFTMAX[:1] + SOFTMAX[-2:]),
    "low rank 16": Entry(partial(product, 16), 128, [
        *each(SHORT=(0,), SHORT_TOKENS=(32, 128), WARPS_SHORT=(2, 8), WARPS_SHORT_BACK=(2, 8)),
        {"STAGES_SHORT": 1},
        {"SHORT_TOKENS": 32, "STAGES_SHORT": 1},
        {"SHORT_TOKENS": 128, "WARPS_SHORT": 8, "WARPS_SHORT_BACK": 8},
    ]),
    "low rank 16 at 2048": Entry(partial(product, 16), 2048, [*ROWS, {"PROGRAMS": 1056}, {"TOKENS": 32}]),
    "low rank 192": Entry(partial(product, 192), 128, [*ROWS, {"PROGRAMS": 2048}]),
    "exact product": Entry(exact, 128, [*each(NUMBERS=(512, 2048)), {"way": "fp32"}]),
    "cross entropy": Entry(losses, 128, LOSSES),
    "cosine sums 128": Entry(cosines, 128, SUMS),
    "cosine sums 2048": Entry(cosines, 2048, SUMS),
    "grid product 128": Entry(differences, 128, [
        *each(SHORT=(0,), SHORT_TOKENS=(32, 128), WARPS_SHORT=(2, 8), WARPS_SHORT_BACK=(2, 8), STAGES_SHORT=(1,)),
        {"SHORT_TOKENS": 32, "STAGES_SHORT": 1},
        {"SHORT_TOKENS": 128, "WARPS_SHORT": 8, "WARPS_SHORT_BACK": 8},
    ]),
    "grid product 2048": Entry(differences, 2048, DIFFERENCES),
    "nonuniform 32768": Entry(nonuniforms, 32768, PRODUCTS),
    "grid sums 2048": Entry(grids, 2048, each(PLACES=(128,), POINTS=(32,), SEEN=(32,), WARPS=(2, 8))),
    "exponential product 128": Entry(exponential, 128, EXPONENTIALS),
    "exponential product 2048": Entry(exponential, 2048, EXPONENTIALS),
}  # fmt: skip


def chosen(text: str) -> list[str]:
    """Names of the cases that begin with one of these words, for argparse."""
    words = text.split(",")
    for word in words:
        if not any(name.startswith(word) for name in CASES):
            raise argparse.ArgumentTypeError(f"no case begins with '{word}'; there are: {', '.join(CASES)}")
    return [name for name in CASES if name.startswith(tuple(words))]
