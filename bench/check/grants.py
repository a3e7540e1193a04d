"""Rows about settings that a mixer may be given: those that it calls unfit, and the head counts that it allows."""

import torch

from bench import Refusal
from bench.check.algebra import EXACT
from bench.check.subject import WIDTH, Failed, Row, Subject, at_most, by_matrix, differ
from bench.mixers.base import Grant

LENGTHS = (1, 2, 7, 31)
SEVERAL = 12  # inner width whose divisors are tried as head counts


def odd(subject: Subject) -> Row:
    """One token, prime lengths, heads of width 1, packed or not: a mixer that does not call itself unfit runs there.

    One that does gives a reason, and refuses (ValueError or Refusal) or runs rightly all the same, never wrongly.
    """
    own = reason(subject, subject.grant(subject.length, False))
    if own:
        raise Failed(
            f"unfit for {subject.length} tokens in heads of width {WIDTH}, where the other rows test it: {own}"
        )
    figures, refused = {}, []
    for length in LENGTHS:
        for width in (1, WIDTH):
            for packed in (False, True):
                grant = Grant(subject.declared.heads, width, length, packed)
                name = f"{length} tokens, head width {width}{', packed' * packed}"
                why = reason(subject, grant)
                try:
                    figures[name] = error(subject, grant)
                except Exception as failure:
                    if not (why and isinstance(failure, (ValueError, Refusal))):
                        raise Failed(f"{name}: {type(failure).__name__}: {failure}") from failure
                    refused.append(f"{name} ({why})")
    rule = f"{len(figures)} odd settings run" + (f"; unfit: {', '.join(refused)}" if refused else "")
    return at_most("odd grants", figures or {"none": 0.0}, EXACT, rule)


def reason(subject: Subject, grant: Grant) -> str:
    why = subject.declared.unfit(grant)
    if not isinstance(why, str) or (why and not why.strip()):
        raise Failed(f"unfit says {why!r}; it must be '' or a reason in words")
    return why


def error(subject: Subject, grant: Grant) -> float:
    """How far `forward` is from `matrix` v there, on a whole row, a shorter one and an empty one."""
    mixer = subject.initialised(subject.make(grant))
    n = grant.length
    segments_BL = subject.documents([[n // 2, n - n // 2] if grant.packed else [n], [(n + 1) // 2], []], n)
    v_BLHP, features = subject.inputs(mixer, segments_BL)
    with torch.no_grad():
        y_BLHP = mixer(v_BLHP, features, segments_BL)
        return differ(y_BLHP, by_matrix(mixer, v_BLHP, features, segments_BL))


def heads_allowed(subject: Subject) -> Row:
    """`heads_allowed` of an inner width lists divisors, and the mixer runs with each.

    Its own arguments may refuse a number of heads (a Refusal), but not all of them.
    """
    allowed = type(subject.mixer(subject.length, False)).heads_allowed(SEVERAL)
    wrong = [h for h in allowed if type(h) is not int or h < 1 or SEVERAL % h]
    if wrong or not allowed:
        raise Failed(f"heads_allowed({SEVERAL}) is {allowed}: not a divisor: {wrong}")
    figures, refused = {}, []
    for count in allowed:
        grant = Grant(count, SEVERAL // count, LENGTHS[-1], False)
        if reason(subject, grant):
            continue
        try:
            figures[f"{count} heads"] = error(subject, grant)
        except Refusal:
            refused.append(count)
        except Exception as failure:
            raise Failed(f"{count} heads: {type(failure).__name__}: {failure}") from failure
    if not figures:
        raise Failed(f"refuses every number of heads that it allows: {refused}")
    rule = f"inner width {SEVERAL}, {', '.join(figures)}" + f"; refused by its arguments: {refused}" * bool(refused)
    return at_most("heads allowed", figures, EXACT, rule)
