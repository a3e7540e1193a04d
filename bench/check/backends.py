"""Rows about other ways to compute `forward`: in bf16 with all gradients, compiled, and by each further backend.

Axes as in `bench.mixers.base`.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from bench import NotInstalled
from bench.check.subject import Row, Subject, at_most, by_matrix, gradients
from bench.mixers.base import Features, Grant, Mixer, real

HALF = 3e-2  # bf16, values and all gradients
SINGLE = 1e-2  # a backend in fp32, which may multiply as TF32
COMPILED = 1e-3  # fp32, against the plain way
PROBES = (2, 3, 4)
LEAST = 0.05  # a gradient's norm counts as at least so much of that of the values: sums over tokens may cancel


def half_gradients(subject: Subject) -> Row:
    """Under bf16 autocast, values and all gradients against `matrix` in fp64: error / size."""
    figures = {}
    for packed in (False, True):
        figures |= errors(subject, subject.make, packed, subject.length, True, plain)
    return at_most("bf16 gradients", figures, HALF, f"autocast against fp64, {subject.length} tokens")


def backends(subject: Subject) -> list[Row]:
    """Each declared backend in fp32 and in bf16, padded and packed, at two lengths, values and all gradients."""
    if not subject.declared.backends:
        return [Row("backends", None, "skip", "only the plain one")]
    rows = []
    for name, make in subject.declared.backends:
        if subject.device == "cpu":
            rows.append(Row(f"backend {name}", None, "skip", "needs a CUDA device: where.device=cuda"))
            continue
        try:
            make(subject.grant(subject.length, False))
        except NotInstalled as missing:
            rows.append(Row(f"backend {name}", None, "skip", str(missing)))
            continue
        for half, bound in ((False, SINGLE), (True, HALF)):
            figures = {}
            for length in (37, subject.long):
                for packed in (False, True):
                    figures |= errors(subject, make, packed, length, half, plain)
                    figures |= with_skip(subject, make, packed, length, half)
            rows.append(at_most(f"backend {name}, {'bf16' if half else 'fp32'}", figures, bound, "against fp64"))
    return rows


def compiled(subject: Subject) -> list[Row]:
    """As training on a GPU computes it, in one graph: a compiler that loses a gradient says nothing of it."""
    if subject.device == "cpu":
        return [Row("compiled", None, "skip", "needs a CUDA device, where training compiles: where.device=cuda")]
    settings = [(False, False), (True, True)] if subject.slow_gradcheck else [(False, False)]
    rows = []
    for half, packed in settings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own: deprecated imports, complex numbers left alone
            torch._dynamo.reset()
            figures = errors(subject, subject.make, packed, subject.long, half, one_graph)
        bound = HALF if half else COMPILED
        rows.append(at_most(f"compiled, {'bf16' if half else 'fp32'}", figures, bound, "against fp64, all gradients"))
    return rows


def plain(mixer: Mixer) -> Callable:
    return mixer


def with_skip(
    subject: Subject, make: Callable[[Grant], Mixer], packed: bool, length: int, half: bool
) -> dict[str, float]:
    """`errors` of the way that has v added, from which it is taken off again; nothing if the mixer never adds it."""
    if type(subject.mixer(length, packed)).with_skip is Mixer.with_skip:
        return {}
    figures = errors(subject, make, packed, length, half, skipping)
    return {f"{key}, with v added": figure for key, figure in figures.items()}


def skipping(mixer: Mixer) -> Callable:
    """v is added as large as M v is, as at the start of a training: what is rounded is the sum."""

    def way(v_BLHP, features, segments_BL):
        with torch.no_grad():
            scale = v_BLHP.float().norm() / mixer(v_BLHP, features, segments_BL).float().norm()
        y_BLHP = mixer.with_skip(v_BLHP, features, segments_BL, scale)
        if y_BLHP is None:
            return mixer(v_BLHP, features, segments_BL)
        return (y_BLHP - v_BLHP / scale) * real(segments_BL, y_BLHP.dtype)

    return way


def one_graph(mixer: Mixer) -> Callable:
    return torch.compile(mixer, fullgraph=True)


def errors(
    subject: Subject,
    make: Callable[[Grant], Mixer],
    packed: bool,
    length: int,
    half: bool,
    through: Callable[[Mixer], Callable],
) -> dict[str, float]:
    """Norm of the difference over the norm, by name: what `make` builds, in fp32 or bf16, against `matrix` in fp64.

    In bf16 under autocast, with v and the features (but for the exact ones) in bf16 as in training.

    Over several projections together: the gradient of a parameter with few entries is a sum over all tokens, which in
    one projection may cancel to less than what rounding leaves.
    """
    exact = subject.mixer(length, packed)
    mixer = subject.initialised(make(subject.grant(length, packed)), torch.float32)
    if length > 128:
        segments_BL = subject.layouts(packed, length)[:2]  # the others hold one token or none, or small documents
    else:
        segments_BL = subject.documents([[length - 9, 9] if packed else [length]], length)
    v_BLHP, features = subject.inputs(exact, segments_BL)
    dtype = torch.bfloat16 if half else torch.float32
    if half:  # the shell's products are bf16 under autocast, except the exact features
        v_BLHP, *others = (x.to(dtype).double() for x in (v_BLHP, *features[:2]))
        features = Features(*others, features.exact_BLK)

    way = through(mixer)

    def fast(*given):
        with torch.autocast(subject.device, torch.bfloat16, enabled=half):
            return way(*given)

    rough_features = Features(*(x.to(dtype) for x in features[:2]), features.exact_BLK.float())
    rough = v_BLHP.to(dtype), rough_features, segments_BL
    wrong, size = Counter(), Counter()  # squares of norms
    for seed in PROBES:
        found = gradients(mixer, fast, *rough, seed)
        wanted = gradients(exact, partial(by_matrix, exact), v_BLHP, features, segments_BL, seed)
        for key, x in wanted.items():
            wrong[key] += float((found[key] - x).square().sum())
            size[key] += float(x.square().sum())
    least = LEAST**2 * size["value"]
    where = f"{length} tokens{', packed' * packed}"
    return {f"{key}, {where}": math.sqrt(wrong[key] / max(size[key], least)) for key in size}
