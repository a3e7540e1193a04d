"""Significance groups as compact letters: two arms share a letter if and only if they were not declared different.

A letter is a maximal set of arms of which no two differ, found by inserting one difference after another and absorbing
sets inside others; sets that no pair needs are swept out (Piepho 2004, J. Comput. Graph. Stat. 13:456).
"""

from string import ascii_letters

import numpy as np

from bench import Refusal


def letters(differs_AA: np.ndarray, value_A: np.ndarray) -> list[str]:
    """One string of letters for each arm, 'a' with the best arm. Larger values are better.

    differs_AA: symmetric, True where two arms were declared different. value_A: means that order the letters; an arm
    whose value is not finite (it has failed runs) gets no letter. No letter can be left out of the answer.
    """
    differs_AA, value_A = np.asarray(differs_AA, bool), np.asarray(value_A, float)
    if differs_AA.shape != (len(value_A),) * 2 or (differs_AA != differs_AA.T).any() or differs_AA.diagonal().any():
        raise Refusal(f"differs must be symmetric, {len(value_A)} x {len(value_A)}, and no arm differs from itself")
    shown = np.flatnonzero(np.isfinite(value_A))
    best_first = shown[np.argsort(-value_A[shown], kind="stable")]
    differs = differs_AA[np.ix_(best_first, best_first)]
    groups = sorted(needed(alike(differs), differs), key=sorted)
    if len(groups) > len(ascii_letters):
        raise Refusal(f"{len(groups)} significance groups, and only {len(ascii_letters)} letters")
    texts = [""] * len(value_A)
    for letter, group in zip(ascii_letters, groups, strict=False):
        for place in group:
            texts[best_first[place]] += letter
    return texts


def alike(differs_AA: np.ndarray) -> set[frozenset[int]]:
    """All maximal sets of arms of which no two differ."""
    groups = {frozenset(range(len(differs_AA)))} if len(differs_AA) else set()
    for i, j in zip(*np.nonzero(np.triu(differs_AA)), strict=True):
        split = {g for g in groups if i in g and j in g}
        parts = {g - {k} for g in split for k in (i, j)}
        groups -= split
        groups |= {g for g in parts if not any(g < other for other in groups | parts)}
    return groups


def needed(groups: set[frozenset[int]], differs_AA: np.ndarray) -> list[frozenset[int]]:
    """The groups without those whose every pair (and every arm) stands in another: first the small ones are tried."""
    count_AA = np.zeros(differs_AA.shape, int)
    for group in groups:
        count_AA[np.ix_(list(group), list(group))] += 1
    kept = []
    for group in sorted(groups, key=lambda g: (len(g), sorted(g))):
        pairs = np.ix_(list(group), list(group))
        if (count_AA[pairs] > 1).all():
            count_AA[pairs] -= 1
        else:
            kept.append(group)
    return kept
