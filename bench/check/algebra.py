"""Rows about the map itself: forward against matrix, gradients, mixing, linearity, gain.

Axes: B batch, L length, H heads, P head width.
"""

import torch
from torch.func import functional_call

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
from bench.mixers.base import Features

EXACT, ROUNDED = 1e-9, 2e-4


def forward_fp64(subject: Subject) -> Row:
    """`forward` = `matrix` @ v in fp64: values and every gradient, padded and packed rows, several lengths."""
    figures = {}
    for packed in (False, True):
        mixer = subject.mixer(subject.length, packed)
        for length in (1, 37, subject.length):
            if length == subject.length:
                segments_BL = subject.layouts(packed, length)
            else:
                segments_BL = subject.documents([[length], [], [length // 2]], length)
            v_BLHP, features = subject.inputs(mixer, segments_BL)
            fast = gradients(mixer, mixer, v_BLHP, features, segments_BL)
            slow = gradients(mixer, lambda *x, m=mixer: by_matrix(m, *x), v_BLHP, features, segments_BL)
            largest = max(float(g.abs().amax()) for g in slow.values() if g.numel())
            for key in slow:
                where = f"{key}, {length} tokens{', packed' * packed}"
                figures[where] = differ(fast[key], slow[key], FLOOR * largest)
    return at_most("forward = matrix v, fp64", figures, EXACT, "values and all gradients")


def forward_fp32(subject: Subject) -> Row:
    """`forward` and `matrix` in fp32 against `matrix` in fp64, relative to the largest entry."""
    figures = {}
    for packed in (False, True):
        segments_BL = subject.layouts(packed, subject.length)
        exact, single = (subject.mixer(subject.length, packed, dtype) for dtype in (torch.float64, torch.float32))
        v_BLHP, features = subject.inputs(exact, segments_BL)
        rounded = v_BLHP.float(), Features(*(x.float() for x in features)), segments_BL
        slow = gradients(exact, lambda *x, m=exact: by_matrix(m, *x), v_BLHP, features, segments_BL)
        largest = max(float(g.abs().amax()) for g in slow.values() if g.numel())
        for way, name in ((single, "forward"), (lambda *x, m=single: by_matrix(m, *x), "matrix")):
            fast = gradients(single, way, *rounded)
            if fast["value"].dtype != torch.float32:
                raise Failed(f"{name} returns {fast['value'].dtype} for fp32")
            for key in slow:
                figures[f"{name}, {key}{', packed' * packed}"] = differ(fast[key], slow[key], 1e-2 * largest)
    return at_most("forward = matrix v, fp32", figures, ROUNDED, "values and all gradients, against fp64")


def numerical_gradients(subject: Subject) -> Row:
    """Autograd against finite differences at a tiny size (torch's gradcheck): v, features and parameters."""
    names = ["v"]
    for packed in (False, True):
        mixer = subject.mixer(5, packed)
        segments_BL = subject.documents([[2, 2] if packed else [4]], 5)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        own = dict(mixer.named_parameters())
        leaves = [x.detach().clone().requires_grad_() for x in (v_BLHP, *features, *own.values())]
        kinds = len(features)
        names = ["v", *features._fields, *own]

        def run(v_BLHP, *rest, m=mixer, s=segments_BL, k=kinds, own=own):
            return functional_call(m, dict(zip(own, rest[k:], strict=True)), (v_BLHP, Features(*rest[:k]), s))

        fast = not subject.slow_gradcheck
        # On a GPU additions may come in any order; how far that is allowed is the row about determinism.
        loose = {"fast_mode": fast, "nondet_tol": 0.0 if subject.device == "cpu" else EXACT}
        if not torch.autograd.gradcheck(run, leaves, raise_exception=False, check_batched_grad=False, **loose):
            return Row("gradcheck", 0.0, "fail", f"autograd differs from finite differences{' (packed)' * packed}")
    return Row("gradcheck", None, "pass", f"autograd = finite differences: {', '.join(names)}")


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


def alive(subject: Subject) -> Row:
    """At the start every parameter tensor has a gradient at more than 9 of 10 entries, every asked channel has one.

    Not at all: a table's first or last entries may be read by nobody.
    """
    segments_BL = subject.documents([[subject.length]] * 2, subject.length)
    mixer = subject.mixer(subject.length, False)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    grads = gradients(mixer, mixer, v_BLHP, features, segments_BL)
    figures = {"v": float((grads["v"] != 0).double().mean())}
    for kind in features._fields:
        if grads[kind].numel():
            figures[f"channels {kind}"] = float((grads[kind].abs().amax((0, 1)) > 0).double().mean())
    for name, _ in mixer.named_parameters():
        figures[f"parameter {name}"] = float((grads[name] != 0).double().mean())
    row = at_least("gradients at initialisation", figures, 0.9, "share of entries (parameters) or channels not zero")
    silent = [name for name, share in figures.items() if name.startswith("channels") and share < 1]
    if silent:
        return row._replace(verdict="fail", note=f"asked for, but without effect: part of {', '.join(silent)}")
    return row


def linear(subject: Subject) -> Row:
    """forward(a v + b w) = a forward(v) + b forward(w), unless declared otherwise; `matrix` does not look at v.

    What declares itself not linear must differ there, and its factors may not look at v either.
    """
    figures, fixed, exempt = {}, {}, "not linear" in subject.structure()
    for packed in (False, True):
        mixer, segments_BL = subject.mixer(subject.length, packed), subject.layouts(packed, subject.length)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        w_BLHP, _ = subject.inputs(mixer, segments_BL, seed=3)
        with torch.no_grad():
            y, z, both = (mixer(x, features, segments_BL) for x in (v_BLHP, w_BLHP, 2 * v_BLHP - 3 * w_BLHP))
            figures[f"forward{', packed' * packed}"] = differ(both, 2 * y - 3 * z)
            m, n = (factors(mixer, x, features, segments_BL) for x in (v_BLHP, w_BLHP))
            fixed[f"matrix{', packed' * packed}"] = differ(n, m)
    if not exempt:
        return at_most("linear in v", figures | fixed, EXACT, "forward of a sum; matrix for another v")
    row = at_least("not linear in v", figures, 0.01, "declared so: distance of forward of a sum from the sum")
    constant = at_most("not linear in v", fixed, EXACT, "its factors for another v")
    return row if constant.verdict == "pass" else constant


def gain(subject: Subject) -> list[Row]:
    """|M v| / |v| at the start for uncorrelated v, and what is left of it beside the mean over tokens."""
    segments_BL = subject.documents([[subject.length]] * 2, subject.length)
    mixer = subject.mixer(subject.length, False)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    with torch.no_grad():
        y_BLHP = mixer(v_BLHP, features, segments_BL)
    whole = float(y_BLHP.norm() / v_BLHP.norm())
    varying = float((y_BLHP - y_BLHP.mean(1, keepdim=True)).norm() / v_BLHP.norm())
    return [
        Row(name, figure, "pass" if 1e-6 < figure < 1e6 else "fail", rule)
        for name, figure, rule in (
            ("gain", whole, "|M v| / |v| at the start; finite and not zero (1e-6 to 1e6)"),
            ("gain, varying", varying, "the same without the mean over tokens: what differs between tokens"),
        )
    ]
