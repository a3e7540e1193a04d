"""Rows about arithmetic: bf16, determinism, heads, initial values, declared structure.

Axes: B batch, L length, H heads, P head width.
"""

import random

import numpy as np
import torch

from bench.check.algebra import EXACT
from bench.check.structure import PREDICATES
from bench.check.subject import (
    WIDTH,
    Failed,
    Row,
    Subject,
    at_most,
    by_matrix,
    differ,
    factors,
    gradients,
    probe,
)
from bench.mixers.base import Features, Mixer

HALF = 2e-2
FREE, FEW = "free diagonal", 24  # the one structure that M alone does not show, and the tokens it is tried on


def bf16(subject: Subject) -> Row:
    """Under bf16 autocast, with fp32 and with bf16 inputs of the same values, against fp64: error / size."""
    figures = {}
    for packed in (False, True):
        exact, single = (subject.mixer(subject.long, packed, dtype) for dtype in (torch.float64, torch.float32))
        segments_BL = subject.layouts(packed, subject.long)[:1]
        v_BLHP, features = subject.inputs(exact, segments_BL)
        half = v_BLHP.bfloat16(), Features(*(x.bfloat16() for x in features))._replace(exact_BLK=features.exact_BLK)
        with torch.no_grad():
            y = by_matrix(exact, half[0].double(), Features(*(x.double() for x in half[1])), segments_BL)
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                rough = Features(*(x.to(dtype) for x in half[1]))
                given = half[0].to(dtype), rough._replace(exact_BLK=half[1].exact_BLK.float())  # exact stays fp32
                with torch.autocast(subject.device, torch.bfloat16):
                    z = single(*given, segments_BL)
                figures[f"{name} inputs{', packed' * packed}"] = float((z.double() - y).norm() / y.norm())
    return at_most("bf16 error", figures, HALF, f"autocast against fp64, {subject.long} tokens")


def deterministic(subject: Subject) -> Row:
    """Two runs of `forward` and of its gradients agree bit for bit, and no global random number is drawn."""
    segments_BL = subject.layouts(False, subject.length)[:2]
    mixer = subject.mixer(subject.length, False, torch.float32)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    given = v_BLHP.float(), Features(*(x.float() for x in features)), segments_BL
    before = drawn(subject.device)
    first, *others = (gradients(mixer, mixer, *given) for _ in range(3))
    if drawn(subject.device) != before:
        raise Failed("forward draws random numbers")
    differing = [key for key in first if not all(torch.equal(first[key], other[key]) for other in others)]
    note = "values and gradients, three runs, bit for bit"
    if differing:
        return Row("determinism", float(len(differing)), "fail", f"{note}: {', '.join(differing)} differ")
    return Row("determinism", 0.0, "pass", note)


def drawn(device: str) -> tuple:
    """The states of the global generators: who draws from one changes it."""
    kind, numbers, *places = np.random.get_state()
    on_device = torch.cuda.get_rng_state().numpy().tobytes() if device == "cuda" else b""
    return random.getstate(), kind, numbers.tobytes(), *places, torch.get_rng_state().numpy().tobytes(), on_device


def heads(subject: Subject) -> Row:
    """Built with the declared number of heads, which the class allows, and head h's output reads head h's v only."""
    count = subject.declared.heads
    mixer = subject.mixer(subject.length, False)
    if mixer.grant.heads != count or count not in type(mixer).heads_allowed(count * WIDTH):
        raise Failed(f"{count} heads declared, {mixer.grant.heads} built")
    segments_BL = subject.layouts(False, subject.length)[1:2]
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    w_BLHP, _ = subject.inputs(mixer, segments_BL, seed=3)
    figures = {}
    with torch.no_grad():
        y = mixer(v_BLHP, features, segments_BL)
        for h in range(count):
            mine = torch.arange(count, device=subject.device)[:, None] == h
            z = mixer(torch.where(mine, v_BLHP, w_BLHP), features, segments_BL)
            figures[f"head {h}"] = differ(z[:, :, h], y[:, :, h])
    return at_most("heads", figures, EXACT, f"{count}, as declared; a head reads its own v only")


def initial(subject: Subject) -> Row:
    """`initial` gives each parameter an fp32 CPU value of its shape from the given generator alone; no buffers."""
    mixer = subject.make(subject.grant(subject.length, False))
    if list(mixer.buffers()):
        raise Failed("has buffers: they are not drawn, counted or averaged as parameters are")
    names = [name for name, _ in mixer.named_parameters()]
    before = drawn(subject.device)
    for name in names:
        first, second = (mixer.initial(name, torch.Generator().manual_seed(5)) for _ in range(2))
        if first.shape != mixer.get_parameter(name).shape or first.dtype != torch.float32:
            raise Failed(f"{name}: {first.dtype} of shape {tuple(first.shape)}")
        if not torch.equal(first, second) or not first.isfinite().all():
            raise Failed(f"{name}: not finite, or not a function of its generator")
    if drawn(subject.device) != before:
        raise Failed("initial draws from a global generator")
    total = sum(p.numel() for p in mixer.parameters())
    note = f"parameters at {subject.length} tokens; fp32, from the generator alone"
    return Row("initial values", float(total), "pass", note)


def structure(subject: Subject) -> list[Row]:
    """One row for each promise that `structure()` names, on `matrix` of one full row; then for `simplest()`."""
    mixer = subject.mixer(subject.length, False)
    rows = promised(subject, mixer, "structure")
    simple = mixer.simplest()
    if simple is not None:
        rows += promised(subject, subject.initialised(simple), "simplest form")
    return rows or [Row("structure", None, "skip", "none declared")]


def promised(subject: Subject, mixer: Mixer, title: str) -> list[Row]:
    names = [name for name in mixer.structure() if name not in ("identity", "not linear")]
    segments_BL = subject.documents([[subject.length]], subject.length)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    with torch.no_grad():
        m_BHLL = factors(mixer, v_BLHP, features, segments_BL)
        same = differ(mixer(v_BLHP, features, segments_BL), by_matrix(mixer, v_BLHP, features, segments_BL))
    rows = []
    for name in names:
        words = name.split(" ")
        kind, bound = (" ".join(words[:-1]), int(words[-1])) if words[-1].isdigit() else (name, 0)
        if kind == FREE:
            figure, limit, rule = tied_diagonal(subject, mixer)
        elif kind in PREDICATES:
            figure, limit, rule = PREDICATES[kind](m_BHLL, bound)
        else:
            raise Failed(f"unknown structure '{name}'; known: {', '.join([*PREDICATES, FREE])}")
        good = figure <= limit and same <= EXACT
        rows.append(Row(f"{title}: {name}", figure, "pass" if good else "fail", f"{rule}; at most {limit:g}"))
    return rows


def tied_diagonal(subject: Subject, mixer: Mixer) -> tuple[float, float, str]:
    """How many entries of the diagonal have no number of their own, one that moves the diagonal and nothing else.

    Such a number, of the features or the parameters, has a gradient of zero by what is off the diagonal and another one
    by the diagonal.
    """
    segments_1L = subject.documents([[FEW]], FEW)
    v_BLHP, features = subject.inputs(mixer, segments_1L)
    features = Features(*(x.requires_grad_() for x in features))
    m_BHLL = factors(mixer, v_BLHP, features, segments_1L)
    own_BHLL = torch.diag_embed(m_BHLL.diagonal(dim1=-2, dim2=-1))
    leaves = [*features, *mixer.parameters()]
    by_own, by_others = (
        torch.autograd.grad((x * probe(x)).sum(), leaves, retain_graph=True, materialize_grads=True)
        for x in (own_BHLL, m_BHLL - own_BHLL)
    )
    free = sum(int(((a != 0) & (b == 0)).sum()) for a, b in zip(by_own, by_others, strict=True))
    return float(max(0, m_BHLL.shape[1] * FEW - free)), 0.0, "entries of the diagonal without a number of their own"
