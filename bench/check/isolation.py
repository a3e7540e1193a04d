"""Rows about what a token may not see: padding, other documents, other rows; and whether M sees the tokens at all.

Axes: B batch, L length, H heads, P head width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.check.algebra import EXACT
from bench.check.inputs import LARGE
from bench.check.subject import Row, Subject, at_least, at_most, differ, factors
from bench.mixers.base import Features, Mixer

LOUD = 1000.0
PARTS = 4  # documents of a row that are looked at one by one: the first, the last and two between


def swap(kept_BL: Tensor, given: tuple[Tensor, Features], other: tuple[Tensor, Features]) -> tuple[Tensor, Features]:
    """v and features as given on kept tokens, ten times the other elsewhere."""
    v_BLHP = torch.where(kept_BL[..., None, None], given[0], 10 * other[0])
    kinds = (torch.where(kept_BL[..., None], x, 10 * o) for x, o in zip(given[1], other[1], strict=True))
    return v_BLHP, Features(*kinds)


def rows_of(given: tuple[Tensor, Features], rows: slice, places: slice = slice(None)) -> tuple[Tensor, Features]:
    """v and features of some rows of the batch, and some places."""
    return given[0][rows, places], Features(*(x[rows, places] for x in given[1]))


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
        segments_BL, y, m, given = segments_BL[1:], y[1:], m[1:], rows_of(given, slice(1, None))  # those with padding
        other, real_BL = subject.inputs(mixer, segments_BL, seed=7), segments_BL > 0
        z, n = results(mixer, *swap(real_BL, given, other), segments_BL)
        figures[f"output on padding{tag}"] = float(y[~real_BL].abs().amax())
        unseen_BLL = ~(real_BL[:, :, None] & real_BL[:, None])
        figures[f"matrix on padding{tag}"] = float((m * unseen_BLL[:, None]).abs().amax())
        figures[f"content, forward{tag}"] = differ(z[real_BL], y[real_BL])
        figures[f"content, matrix{tag}"] = differ(n, m)
        figures[f"content, large features{tag}"] = masked(mixer, real_BL, given, other, segments_BL)
        figures[f"content, bf16{tag}"] = drowned(subject, packed, slice(1, 3))
        short = subject.length // 2 - 4
        rows = [[short - 9, 9] if packed else [short]]
        filled = subject.documents(rows, subject.length)
        whole, cut = rows_of(given, slice(1)), rows_of(given, slice(1), slice(short))
        for way, name in ((mixer, "forward"), (partial(factors, mixer), "matrix")):
            figures[f"amount, {name}{tag}"] = differ(
                call(way, whole, filled, short), call(way, cut, subject.documents(rows, short), short)
            )
    return at_most("padding invariance", figures, EXACT, "content and amount of padding change nothing")


def call(way: Callable, given: tuple[Tensor, Features], segments_BL: Tensor, n: int) -> Tensor:
    """The result on the first n tokens: y_BLHP, or the block of M_BHLL."""
    with torch.no_grad():
        out = way(*given, segments_BL)
    return out[..., :n, :n] if out.shape[-1] == out.shape[-2] == segments_BL.shape[1] else out[:, :n]


def segments(subject: Subject) -> Row:
    """No document's result changes with the content of another document of the row."""
    mixer, every_BL, whole, (y, m) = settled(subject, True)
    strangers = subject.inputs(mixer, every_BL, seed=7)
    segments_BL, y, m = every_BL[:2], y[:2], m[:2]
    given, other = rows_of(whole, slice(2)), rows_of(strangers, slice(2))
    apart_BLL = segments_BL[:, :, None] != segments_BL[:, None]
    figures = {"matrix between documents": float((m * apart_BLL[:, None]).abs().amax())}
    last_B1 = segments_BL.amax(1, keepdim=True)
    for part in range(PARTS):
        kept_BL = (segments_BL == 1 + part * (last_B1 - 1) // (PARTS - 1)) & (segments_BL > 0)
        swapped = swap(kept_BL, given, other)
        with torch.no_grad():
            z = mixer(*swapped, segments_BL)
        figures[f"part {part} of the documents, forward"] = differ(z[kept_BL], y[kept_BL])
    kept_BHLL = (kept_BL[:, :, None] & kept_BL[:, None])[:, None]
    n = factors(mixer, *swapped, segments_BL).detach()
    figures["last documents, matrix"] = differ(n * kept_BHLL, m * kept_BHLL)
    # In all rows: small documents may have low scores only.
    figures["large features"] = masked(mixer, every_BL % 2 == 1, whole, strangers, every_BL)
    figures["bf16"] = drowned(subject, True, slice(2))
    return at_most("segment isolation", figures, EXACT, "no document sees another one of its row")


def masked(mixer: Mixer, kept_BL: Tensor, given: tuple, other: tuple, segments_BL: Tensor) -> float:
    """How far kept tokens move with what stands elsewhere if all features are large: a mask by a number that is only
    far below the usual scores is none there."""
    given, other = ((v_BLHP, Features(*(LARGE * x for x in features))) for v_BLHP, features in (given, other))
    with torch.no_grad():
        y, z = mixer(*given, segments_BL), mixer(*swap(kept_BL, given, other), segments_BL)
    return differ(z[kept_BL], y[kept_BL])


def drowned(subject: Subject, packed: bool, rows: slice) -> float:
    """Under bf16 autocast: how far every other document moves if v elsewhere is a thousand times as large.

    A weight of zero is exact in any precision, one that is only small is not seen beside the rounding of bf16.
    """
    mixer = subject.mixer(subject.length, packed, torch.float32)
    segments_BL = subject.layouts(packed, subject.length)[rows]
    kept_BL = segments_BL % 2 == 1
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    v_BLHP, features = v_BLHP.float(), Features(*(x.float() for x in features))
    loud_BLHP = torch.where(kept_BL[..., None, None], v_BLHP, LOUD * v_BLHP)
    with torch.no_grad(), torch.autocast(subject.device, torch.bfloat16):
        y, z = (mixer(x, features, segments_BL) for x in (v_BLHP, loud_BLHP))
    return differ(z[kept_BL], y[kept_BL])


def alone(subject: Subject) -> Row:
    """A document gives in a packed row what it gives by itself, wherever it stands and whatever stands beside it.

    SAM: by itself is alone in an unpacked row. Not SAM, where entries belong to places of the row: in its place, its
    neighbours joined to one document before it and padding behind it; and a lone document is as in an unpacked row.
    """
    packed, single = subject.mixer(subject.length, True), subject.mixer(subject.length, False)
    _, segments_BL, given, (y, m) = settled(subject, True)
    figures = {}
    for b, number in ((0, 1), (0, 3), (0, 4), (0, int(segments_BL[0].max())), (1, 2), (3, 2)):
        at_N = (segments_BL[b] == number).nonzero()[:, 0]
        own = slice(int(at_N[0]), int(at_N[-1]) + 1)
        cut = own if subject.declared.sam else slice(0, own.stop)
        place_1L = torch.arange(cut.start, cut.stop, device=subject.device)[None]
        apart_1L = torch.where(place_1L < own.start, 1, 1 + int(own.start > cut.start))
        mine = rows_of(given, slice(b, b + 1), cut)
        z, n = results(single if subject.declared.sam else packed, *mine, apart_1L)
        where = f"document {number} of row {b}"
        size = own.stop - own.start
        figures[f"{where}, forward"] = differ(z[:, -size:], y[b : b + 1, own])
        figures[f"{where}, matrix"] = differ(n[..., -size:, -size:], m[b : b + 1, :, own, own])
    lone_BL = subject.documents([[subject.length // 2]], subject.length)
    mine = rows_of(given, slice(1))
    (x, k), (z, n) = (results(mixer, *mine, lone_BL) for mixer in (packed, single))
    figures |= {"a lone document, forward": differ(x, z), "a lone document, matrix": differ(k, n)}
    return at_most("document alone", figures, EXACT, "a document in company as by itself")


def batch(subject: Subject) -> Row:
    """A row alone gives what it gives in company, whatever the company holds."""
    figures = {}
    for packed in (False, True):
        mixer, segments_BL, given, (y, m) = settled(subject, packed)
        other = subject.inputs(mixer, segments_BL, seed=7)
        for b in (1, 2):  # with padding, and empty
            mine = rows_of(given, slice(b, b + 1))
            z, n = results(mixer, *mine, segments_BL[b : b + 1])
            figures[f"row {b} alone, forward{', packed' * packed}"] = differ(z, y[b : b + 1])
            figures[f"row {b} alone, matrix{', packed' * packed}"] = differ(n, m[b : b + 1])
        kept_BL = torch.zeros_like(segments_BL[:2], dtype=torch.bool)
        kept_BL[1] = True
        swapped = swap(kept_BL, rows_of(given, slice(2)), rows_of(other, slice(2)))
        z, n = results(mixer, *swapped, segments_BL[:2])
        figures[f"other company, forward{', packed' * packed}"] = differ(z[1], y[1])
        figures[f"other company, matrix{', packed' * packed}"] = differ(n[1], m[1])
    return at_most("batch independence", figures, EXACT, "a row's result is its own")


def data_dependence(subject: Subject) -> Row:
    """Not SAM: nothing the tokens hold changes M, its diagonal included. SAM: the features do change it."""
    figures, moved = {}, {}
    for packed in (False, True):
        mixer, *settings = settled(subject, packed)
        segments_BL, v, y, m = (x[:2] for x in (settings[0], settings[1][0], *settings[2]))
        w, g = subject.inputs(mixer, segments_BL, seed=3)
        with torch.no_grad():
            n, other = factors(mixer, w, g, segments_BL), mixer(v, g, segments_BL)
        tag = ", packed" * packed
        figures[f"matrix{tag}"] = differ(n, m)
        figures[f"diagonal{tag}"] = differ(n.diagonal(dim1=2, dim2=3), m.diagonal(dim1=2, dim2=3))
        figures[f"forward{tag}"] = differ(other, y)  # the same v with other features
        for h in range(m.shape[1]):
            moved[f"head {h}{tag}"] = differ(n[:, h], m[:, h])
    if not subject.declared.sam:
        return at_most("data independence", figures, EXACT, "not SAM: M is the same for all tokens, diagonal included")
    return at_least("data dependence", moved, 1e-3, "SAM: other features, another M, each head")
