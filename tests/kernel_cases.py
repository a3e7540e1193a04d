"""What test_kernels.py runs in a process of its own: kernels against plain torch, the figures as JSON.

In Triton's interpreter on the CPU, or else on the GPU.
"""

import itertools
import json
import os
import sys

import torch
import torch.nn.functional as F

from bench import backbone, shell
from bench.check import subject_of
from bench.check.backends import errors, plain
from bench.check.verb import of
from bench.compose import make_run, make_where
from bench.kernels import conv, low_rank, scan
from bench.kernels.gated_norm import gated_norm
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
    FOUND[name] = max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs)


def segments(packed):
    rows = [[1] * 10 + [2] * 24 + [0] * 4, [1] * 38] if packed else [[1] * 27 + [0] * 11, [1] * 38]
    return torch.tensor(rows, device=DEVICE)


def convolution():
    if INTERPRETED:
        conv.TOKENS = 16  # several stretches in a short row: the interpreter is slow
    for packed, causal, silu in itertools.product((False, True), repeat=3):
        if not INTERPRETED or (packed + causal + silu) % 2:
            one_convolution(packed, causal, silu)


def one_convolution(packed, causal, silu):
    s_BL = segments(packed)

    def exact(wide, weight, bias):
        x = wide[..., 40:] * (s_BL > 0)[..., None]
        y = shell.short_conv(x, s_BL, weight, bias, causal, packed)
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


def product():
    for rank, width, programs in ((5, 6, 512), (100, 70, 512), (5, 6, 1)):
        low_rank.PROGRAMS = programs
        inputs = random(2, 130, 2, 3, rank), random(2, 130, 3, width)
        compare(f"low rank {rank} {programs=}", fast_product, exact_product, *inputs)


def fast_product(qk, v):
    return low_rank.low_rank_product(*qk.unbind(2), v)


def exact_product(qk, v):
    return torch.einsum("bihr,bjhr,bjhp->bihp", *qk.unbind(2), v)


def model():
    """A whole model with fused shells, and again on its plain backends, against itself without."""
    made, task = built(shrunk(make_run("quick_recall", "quasiseparable", {}, 0, 0)))
    made.to(DEVICE)
    batch = {key: x.to(DEVICE) for key, x in task.example(4).items()}
    parameters = [p for _, p in sorted(made.named_parameters())]

    def gradients():
        loss = task.loss(made(batch), batch)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    exact = gradients()
    backbone.fuse(made)
    fast = gradients()
    with backbone.plain(made):
        again = gradients()
    FOUND["model"] = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(fast, exact, strict=True))
    FOUND["model, differs"] = float(all(torch.equal(a, b) for a, b in zip(fast, exact, strict=True)))
    FOUND["model, plain again"] = float(not all(torch.equal(a, b) for a, b in zip(again, exact, strict=True)))


def mixer(name, changes):
    """A mixer's backend against its own matrix in fp64, as `check` holds it to on a GPU."""
    if INTERPRETED:
        scan.CHUNK = 16  # several chunks in a short row: the interpreter is slow
    for label, (make, declared) in of(name, changes, make_where({"where.device": "cpu"})).items():
        ways = dict(declared.backends)
        subject = subject_of(make, declared, full=False, device=DEVICE)
        for packed in (False, True):
            figures = errors(subject, ways["triton"], packed, 37 if INTERPRETED else 300, False, plain)
            FOUND[f"{label} {packed=}"] = max(figures.values())


for call in json.loads(sys.argv[1]):
    globals()[call[0]](*call[1:])
print(json.dumps(FOUND))
