"""Rows about the map itself: forward against matrix, mixing, linearity, gain.

Axes: B batch, L length, H heads, P head width.
"""

from functools import partial

import torch
from torch import Tensor

from bench.check.subject import (
    FLOOR,
    Failed,
    Row,
    Subject,
    at_least,
    at_most,
    by_matrix,
    differ,
    factors,
    gradients,
    pushed,
)
from bench.mixers.base import Features, Mixer

EXACT, ROUNDED = 1e-9, 2e-4
LEAST, MOST = 1e-3, 1e3  # gain at the start
VARYING = 0.02  # of the gain: what must differ between tokens


def forward_fp64(subject: Subject) -> Row:
    """`forward` = `matrix` @ v in fp64: values and every gradient, padded, packed and empty rows, several lengths."""
    figures = {}
    for packed in (False, True):
        mixer = subject.mixer(subject.length, packed)
        for length in (1, 37, subject.length):
            if length == subject.length:
                segments_BL = subject.layouts(packed, length)[:2]
            else:
                segments_BL = subject.documents([[length], [], [length // 2]], length)
            v_BLHP, features = subject.inputs(mixer, segments_BL)
            fast = gradients(mixer, mixer, v_BLHP, features, segments_BL)
            slow = by_reference(subject, mixer, segments_BL)
            largest = max(float(g.abs().amax()) for g in slow.values() if g.numel())
            for key in slow:
                where = f"{key}, {length} tokens{', packed' * packed}"
                figures[where] = differ(fast[key], slow[key], FLOOR * largest)
    return at_most("forward = matrix v, fp64", figures, EXACT, "values and all gradients")


def by_reference(subject: Subject, mixer: Mixer, segments_BL: Tensor) -> dict[str, Tensor]:
    """Value and gradients by `matrix` in fp64 on the usual inputs, kept for the rows that compare with them."""
    key = ("reference", mixer.grant, segments_BL.shape[1])
    if key not in subject.results:
        given = subject.inputs(mixer, segments_BL)
        subject.results[key] = gradients(mixer, partial(by_matrix, mixer), *given, segments_BL)
    return subject.results[key]


def forward_fp32(subject: Subject) -> Row:
    """`forward` and `matrix` in fp32 against `matrix` in fp64, relative to the largest entry."""
    figures = {}
    for packed in (False, True):
        segments_BL = subject.layouts(packed, subject.length)[:2]
        exact, single = (subject.mixer(subject.length, packed, dtype) for dtype in (torch.float64, torch.float32))
        v_BLHP, features = subject.inputs(exact, segments_BL)
        rounded = v_BLHP.float(), Features(*(x.float() for x in features)), segments_BL
        slow = by_reference(subject, exact, segments_BL)
        largest = max(float(g.abs().amax()) for g in slow.values() if g.numel())
        for way, name in ((single, "forward"), (lambda *x, m=single: by_matrix(m, *x), "matrix")):
            fast = gradients(single, way, *rounded)
            if fast["value"].dtype != torch.float32:
                raise Failed(f"{name} returns {fast['value'].dtype} for fp32")
            for key in slow:
                figures[f"{name}, {key}{', packed' * packed}"] = differ(fast[key], slow[key], 1e-2 * largest)
    return at_most("forward = matrix v, fp32", figures, ROUNDED, "values and all gradients, against fp64")


def mixes_tokens(subject: Subject) -> Row:
    """Share of M's norm off the diagonal, the smallest over heads, of the matrix that `forward` really applies."""
    length = 24
    mixer = subject.mixer(length, False)
    segments_1L = subject.documents([[length]], length)
    m_HLL = pushed(mixer, *subject.inputs(mixer, segments_1L), segments_1L)
    off_HLL = m_HLL - torch.diag_embed(m_HLL.diagonal(dim1=1, dim2=2))
    shares = (off_HLL.norm(dim=(1, 2)) / m_HLL.norm(dim=(1, 2))).tolist()
    if "identity" in subject.structure():
        figures = {f"head {h}": share for h, share in enumerate(shares)}
        return at_most("mixes tokens", figures, 0.0, "declared the identity: no off-diagonal mass")
    figures = {f"head {h}": share for h, share in enumerate(shares)}
    return at_least("mixes tokens", figures, 0.02, "off-diagonal share of |M|, each head")


def linear(subject: Subject) -> Row:
    """forward(a v + b w) = a forward(v) + b forward(w), a large or small too, unless declared otherwise; `matrix` does
    not look at v.

    What declares itself not linear must differ there, and its factors may not look at v either.
    """
    figures, fixed, exempt = {}, {}, "not linear" in subject.structure()
    for packed in (False, True):
        mixer, segments_BL = subject.mixer(subject.length, packed), subject.layouts(packed, subject.length)[1:2]
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        w_BLHP, _ = subject.inputs(mixer, segments_BL, seed=3)
        with torch.no_grad():
            y, z, both = (mixer(x, features, segments_BL) for x in (v_BLHP, w_BLHP, 2 * v_BLHP - 3 * w_BLHP))
            figures[f"forward{', packed' * packed}"] = differ(both, 2 * y - 3 * z)
            for size in () if exempt else (1e4, 1e-6):
                figures[f"forward of {size:g} v{', packed' * packed}"] = differ(
                    mixer(size * v_BLHP, features, segments_BL), size * y
                )
            m, n = (factors(mixer, x, features, segments_BL) for x in (v_BLHP, w_BLHP))
            fixed[f"matrix{', packed' * packed}"] = differ(n, m)
    if not exempt:
        return at_most("linear in v", figures | fixed, EXACT, "forward of a sum; matrix for another v")
    row = at_least("not linear in v", figures, 0.01, "declared so: distance of forward of a sum from the sum")
    constant = at_most("not linear in v", fixed, EXACT, "its factors for another v")
    return row if constant.verdict == "pass" else constant


def gain(subject: Subject) -> list[Row]:
    """|M v| / |v| at the start for uncorrelated v, and what is left of it beside the mean over tokens.

    Neither may be so small that the mixer is as good as off, nor the second so small that all tokens get one mean.
    """
    segments_BL = subject.documents([[subject.length]] * 2, subject.length)
    mixer = subject.mixer(subject.length, False)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    with torch.no_grad():
        y_BLHP = mixer(v_BLHP, features, segments_BL)
    whole = float(y_BLHP.norm() / v_BLHP.norm())
    varying = float((y_BLHP - y_BLHP.mean(1, keepdim=True)).norm() / v_BLHP.norm())
    rows = (
        ("gain", whole, LEAST, "|M v| / |v| at the start"),
        ("gain, varying", varying, max(LEAST, VARYING * whole), "the same without the mean over tokens"),
    )
    return [
        Row(name, figure, "pass" if least < figure < MOST else "fail", f"{rule}; from {least:.1g} to {MOST:g}")
        for name, figure, least, rule in rows
    ]
