"""Rows about gradients by themselves, `matrix` or not: right by finite differences, and alive at the start.

Axes: B batch, L length, H heads, P head width.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from bench.check.algebra import EXACT
from bench.check.subject import Row, Subject, at_least, at_most, gradients, probe
from bench.mixers.base import Features, Mixer

CLOSE = 1e-5  # gradcheck: what finite differences leave at its step of 1e-6
STEP, NEAR = 1e-6, 1e-6  # central differences along a direction, and how close they must be
FAINT = 1e-9


def entries(subject: Subject) -> Row:
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
        strict = {"fast_mode": fast, "rtol": CLOSE, "atol": CLOSE, "check_batched_grad": False}
        strict["nondet_tol"] = 0.0 if subject.device == "cpu" else EXACT
        if not torch.autograd.gradcheck(run, leaves, raise_exception=False, **strict):
            return Row("gradcheck", 0.0, "fail", f"autograd differs from finite differences{' (packed)' * packed}")
    return Row("gradcheck", None, "pass", f"autograd = finite differences: {', '.join(names)}")


def directions(subject: Subject) -> Row:
    """At full length, two rows: the slope along a random direction of v, each kind of features and each parameter.

    It is that of a random projection of the output, by autograd and by central differences, relative to the size that
    such a slope has (the gradient's norm). So what shows only late in a row or beside another row of the batch, in
    `matrix` as in `forward`, is seen too.
    """
    figures = {}
    for packed in (False, True):
        mixer, segments_BL = subject.mixer(subject.length, packed), subject.layouts(packed, subject.length)[:2]
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        grads = gradients(mixer, mixer, v_BLHP, features, segments_BL)
        leaves = {"v": v_BLHP, **features._asdict(), **{name: p.detach() for name, p in mixer.named_parameters()}}
        for key, x in leaves.items():
            if x.numel():
                along = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype).to(x.device)
                ends = [projected(mixer, leaves | {key: x + s * along}, segments_BL) for s in (STEP, -STEP)]
                slope, size = (ends[0] - ends[1]) / (2 * STEP), max(float(grads[key].norm()), FAINT)
                figures[f"{key}{', packed' * packed}"] = abs(float((grads[key] * along).sum()) - slope) / size
    return at_most("gradients of whole rows", figures, NEAR, "slopes along random directions, central differences")


def projected(mixer: Mixer, leaves: dict[str, Tensor], segments_BL: Tensor) -> float:
    """The number whose gradients `gradients` gives."""
    own = {name: leaves[name] for name, _ in mixer.named_parameters()}
    features = Features(*(leaves[kind] for kind in Features._fields))
    with torch.no_grad():
        y_BLHP = functional_call(mixer, own, (leaves["v"], features, segments_BL))
    return float((y_BLHP * probe(y_BLHP)).sum())


def alive(subject: Subject) -> Row:
    """At the start every parameter tensor has a gradient at more than 9 of 10 entries, every asked channel has one.

    Not at all: a table's first or last entries may be read by nobody. A gradient is one above `FAINT` of the largest.
    """
    segments_BL = subject.documents([[subject.length]] * 2, subject.length)
    mixer = subject.mixer(subject.length, False)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    grads = gradients(mixer, mixer, v_BLHP, features, segments_BL)
    faint = FAINT * max(float(g.abs().amax()) for key, g in grads.items() if key != "value" and g.numel())
    figures = {"v": float((grads["v"].abs() > faint).double().mean())}
    for kind in features._fields:
        if grads[kind].numel():
            figures[f"channels {kind}"] = float((grads[kind].abs().amax((0, 1)) > faint).double().mean())
    for name, _ in mixer.named_parameters():
        figures[f"parameter {name}"] = float((grads[name].abs() > faint).double().mean())
    row = at_least("gradients at initialisation", figures, 0.9, "share of entries (parameters) or channels not zero")
    silent = [name for name, share in figures.items() if name.startswith("channels") and share < 1]
    if silent:
        return row._replace(verdict="fail", note=f"asked for, but without effect: part of {', '.join(silent)}")
    return row
