"""Rows about the length of a row, shorter or longer than others or than what was granted.

Axes: B batch, L length, H heads, P head width.
"""

from functools import partial

import torch

from bench.check.algebra import EXACT
from bench.check.isolation import results
from bench.check.subject import Failed, Row, Subject, at_most, by_matrix, differ, factors


def shorter(subject: Subject) -> Row:
    """Any shorter row runs, in `forward` and `matrix`, with equal results."""
    figures = {}
    mixer = subject.mixer(subject.length, False)
    powers = [2**k for k in range(subject.length.bit_length()) if 2**k < subject.length]
    for length in sorted({7, subject.length // 2, subject.length - 1, *powers}):
        segments_BL = subject.documents([[length]], length)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        with torch.no_grad():
            y, z = (way(v_BLHP, features, segments_BL) for way in (mixer, partial(by_matrix, mixer)))
        figures[f"{length} tokens"] = differ(y, z)
    return at_most("shorter lengths", figures, EXACT, f"rows of 1 to {subject.length - 1} tokens run")


def longer(subject: Subject) -> Row:
    """Long rows, whole and packed, run. SAM: far longer ones than granted. Not SAM: no longer ones, by a ValueError."""
    sam, long = subject.declared.sam, subject.long
    granted = subject.length // 2 if sam else long
    edge = 1 << (long - 1).bit_length() - 1  # the largest power of two below: where chunks may end
    figures = {}
    for rows in ([long], [edge - 2, 1, 2, long - edge - 1]):
        mixer, segments_BL = subject.mixer(granted, len(rows) > 1), subject.documents([rows], long)
        v_BLHP, features = subject.inputs(mixer, segments_BL)
        with torch.no_grad():
            y, z = (way(v_BLHP, features, segments_BL) for way in (mixer, partial(by_matrix, mixer)))
        figures[f"{long} tokens{', packed' * (len(rows) > 1)}"] = differ(y, z)
    if sam:
        return at_most("longer lengths", figures, EXACT, f"SAM: {long} tokens run, {granted} granted")
    refuses(subject)
    return at_most("longer lengths", figures, EXACT, f"not SAM: {long} tokens run if granted, else are refused")


def refuses(subject: Subject) -> None:
    """One token more than granted: neither `forward` nor `matrix` makes something up."""
    length = subject.length + 1
    mixer, segments_BL = subject.mixer(subject.length, False), subject.documents([[length]], length)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    for way, name in ((mixer, "forward"), (partial(factors, mixer), "matrix")):
        try:
            way(v_BLHP, features, segments_BL)
        except ValueError:
            continue
        raise Failed(f"{name} takes {length} tokens where {subject.length} were granted; not SAM: must be a ValueError")


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
