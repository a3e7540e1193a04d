"""Rows about what a token may not see, and about lengths.

Axes: B batch, L length, H heads, P head width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.check.algebra import EXACT
from bench.check.subject import Failed, Row, Subject, at_most, by_matrix, differ, factors
from bench.mixers.base import Features, Mixer


def swap(kept_BL: Tensor, given: tuple[Tensor, Features], other: tuple[Tensor, Features]) -> tuple[Tensor, Features]:
    """v and features as given on kept tokens, ten times the other elsewhere."""
    v_BLHP = torch.where(kept_BL[..., None, None], given[0], 10 * other[0])
    kinds = (torch.where(kept_BL[..., None], x, 10 * o) for x, o in zip(given[1], other[1], strict=True))
    return v_BLHP, Features(*kinds)


def results(mixer: Mixer, v_BLHP: Tensor, features: Features, segments_BL: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return mixer(v_BLHP, features, segments_BL), factors(mixer, v_BLHP, features, segments_BL)


def settled(subject: Subject, packed: bool):
    """Mixer, segments, inputs and results of the usual layout: what rows vary, computed once for all of them."""
    if packed not in subject.results:
        mixer, segments_BL = subject.mixer(subject.length, packed), subject.layouts(packed, subject.length)
        given = subject.inputs(mixer, segments_BL)
        subject.results[packed] = mixer, segments_BL, given, results(mixer, *given, segments_BL)
    return subject.results[packed]


def padding(subject: Subject) -> Row:
    """Neither what stands on padding nor how much of it there is changes a real token's row; padding's rows are 0."""
    figures = {}
    for packed in (False, True):
        tag, (mixer, segments_BL, given, (y, m)) = ", packed" * packed, settled(subject, packed)
        other, real_BL = subject.inputs(mixer, segments_BL, seed=7), segments_BL > 0
        z, n = results(mixer, *swap(real_BL, given, other), segments_BL)
        figures[f"output on padding{tag}"] = float(y[~real_BL].abs().amax())
        unseen_BLL = ~(real_BL[:, :, None] & real_BL[:, None])
        figures[f"matrix on padding{tag}"] = float((m * unseen_BLL[:, None]).abs().amax())
        figures[f"content, forward{tag}"] = differ(z[real_BL], y[real_BL])
        figures[f"content, matrix{tag}"] = differ(n, m)
        short = subject.length // 2 - 4
        rows = [[short - 9, 9] if packed else [short]]
        filled = subject.documents(rows, subject.length)
        for way, name in ((mixer, "forward"), (partial(factors, mixer), "matrix")):
            alone = tuple(x[:1, :short] for x in (given[0], *given[1]))
            figures[f"amount, {name}{tag}"] = differ(
                call(way, (given[0][:1], Features(*(x[:1] for x in given[1]))), filled, short),
                call(way, (alone[0], Features(*alone[1:])), subject.documents(rows, short), short),
            )
    return at_most("padding invariance", figures, EXACT, "content and amount of padding change nothing")


def call(way: Callable, given: tuple[Tensor, Features], segments_BL: Tensor, n: int) -> Tensor:
    """The result on the first n tokens: y_BLHP, or the block of M_BHLL."""
    with torch.no_grad():
        out = way(*given, segments_BL)
    return out[..., :n, :n] if out.shape[-1] == out.shape[-2] == segments_BL.shape[1] else out[:, :n]


def segments(subject: Subject) -> Row:
    """No document's result changes with the content of another document of the row."""
    mixer, segments_BL, given, (y, m) = settled(subject, True)
    other = subject.inputs(mixer, segments_BL, seed=7)
    apart_BLL = segments_BL[:, :, None] != segments_BL[:, None]
    figures = {"matrix between documents": float((m * apart_BLL[:, None]).abs().amax())}
    for number in range(1, int(segments_BL.max()) + 1):
        kept_BL = segments_BL == number
        z, n = results(mixer, *swap(kept_BL, given, other), segments_BL)
        kept_BHLL = (kept_BL[:, :, None] & kept_BL[:, None])[:, None]
        figures[f"document {number}, forward"] = differ(z[kept_BL], y[kept_BL])
        figures[f"document {number}, matrix"] = differ(n * kept_BHLL, m * kept_BHLL)
    return at_most("segment isolation", figures, EXACT, "no document sees another one of its row")


def batch(subject: Subject) -> Row:
    """A row alone gives what it gives in company, whatever the company holds."""
    figures = {}
    for packed in (False, True):
        mixer, segments_BL, given, (y, m) = settled(subject, packed)
        other = subject.inputs(mixer, segments_BL, seed=7)
        for b in range(len(segments_BL)):
            mine = given[0][b : b + 1], Features(*(x[b : b + 1] for x in given[1]))
            z, n = results(mixer, *mine, segments_BL[b : b + 1])
            figures[f"row {b} alone, forward{', packed' * packed}"] = differ(z, y[b : b + 1])
            figures[f"row {b} alone, matrix{', packed' * packed}"] = differ(n, m[b : b + 1])
        kept_BL = torch.zeros_like(segments_BL, dtype=torch.bool)
        kept_BL[1] = True
        z, n = results(mixer, *swap(kept_BL, given, other), segments_BL)
        figures[f"other company, forward{', packed' * packed}"] = differ(z[1], y[1])
        figures[f"other company, matrix{', packed' * packed}"] = differ(n[1], m[1])
    return at_most("batch independence", figures, EXACT, "a row's result is its own")


def data_dependence(subject: Subject) -> Row:
    """Not SAM: nothing the tokens hold changes M, its diagonal included. SAM: the features do change it."""
    figures = {}
    for packed in (False, True):
        mixer, segments_BL, (v, _), (y, m) = settled(subject, packed)
        w, g = subject.inputs(mixer, segments_BL, seed=3)
        (_, n), (other, _) = results(mixer, w, g, segments_BL), results(mixer, v, g, segments_BL)
        tag = ", packed" * packed
        figures[f"matrix{tag}"] = differ(n, m)
        figures[f"diagonal{tag}"] = differ(n.diagonal(dim1=2, dim2=3), m.diagonal(dim1=2, dim2=3))
        figures[f"forward{tag}"] = differ(other, y)  # the same v with other features
    if not subject.declared.sam:
        return at_most("data independence", figures, EXACT, "not SAM: M is the same for all tokens, diagonal included")
    figure = figures["matrix"]
    return Row("data dependence", figure, "pass" if figure > 1e-3 else "fail", "SAM: other features, another M")


def shorter(subject: Subject) -> Row:
    """Any shorter row runs, in `forward` and `matrix`, with equal results."""
    figures = {}
    mixer = subject.mixer(subject.length, False)
    for length in (1, 2, 7, subject.length // 2, subject.length - 1):
        segments_BL = subject.documents([[length]], length)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        with torch.no_grad():
            y, z = (way(v_BLHP, features, segments_BL) for way in (mixer, partial(by_matrix, mixer)))
        figures[f"{length} tokens"] = differ(y, z)
    return at_most("shorter lengths", figures, EXACT, f"rows of 1 to {subject.length - 1} tokens run")


def longer(subject: Subject) -> Row:
    """SAM: longer rows than granted run. Not SAM: `forward` and `matrix` refuse them with a ValueError."""
    length = subject.length + 50
    mixer, segments_BL = subject.mixer(subject.length, False), subject.documents([[length]], length)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    if subject.declared.sam:
        with torch.no_grad():
            y, z = (way(v_BLHP, features, segments_BL) for way in (mixer, partial(by_matrix, mixer)))
        figures = {f"{length} tokens": differ(y, z)}
        return at_most("longer lengths", figures, EXACT, f"SAM: {length} tokens run, {subject.length} granted")
    for way, name in ((mixer, "forward"), (partial(factors, mixer), "matrix")):
        try:
            way(v_BLHP, features, segments_BL)
        except ValueError:
            continue
        raise Failed(f"{name} takes {length} tokens where {subject.length} were granted; not SAM: must be a ValueError")
    return Row("longer lengths", None, "pass", "not SAM: refused")


def granted_length(subject: Subject) -> Row:
    """SAM: with the same parameter values, the result on given tokens does not depend on the longest length granted."""
    if not subject.declared.sam:
        return Row("granted length", None, "skip", "not SAM: parameters belong to a length")
    figures = {}
    n = subject.length // 2
    for packed in (False, True):
        short, long = (subject.mixer(length, packed) for length in (n, 3 * n))
        long.load_state_dict(short.state_dict())
        segments_BL = subject.documents([[n - 20, 20] if packed else [n]], n)
        given = subject.inputs(short, segments_BL)
        (y, m), (z, k) = results(short, *given, segments_BL), results(long, *given, segments_BL)
        figures[f"forward{', packed' * packed}"] = differ(z, y)
        figures[f"matrix{', packed' * packed}"] = differ(k, m)
    return at_most("granted length", figures, EXACT, f"SAM: same result on {n} tokens, granted {n} or {3 * n}")
