"""A device's time, split between the runs that were on it. For what a table cost, and for what a plan reckons from it.

Runs that shared a device stretched each other, so their seconds do not add up to the device's. Each moment is split
evenly between the runs that were at work on that device then; the shares of all add up to the time in which any was.
"""

from typing import NamedTuple

import numpy as np

# Axes: R runs, K moments at which a run begins or ends.


class Stay(NamedTuple):
    """When one run was on which device; the first of several stands for all."""

    node: str
    model: str
    card: str
    end: float  # seconds since 1970
    wall: float


def shares(stays: dict[str, Stay]) -> dict[str, float]:
    """By run: seconds of its device that were its own."""
    devices: dict[tuple, list[str]] = {}
    for run_id, stay in stays.items():
        devices.setdefault((stay.node, stay.model, stay.card), []).append(run_id)
    found: dict[str, float] = {}
    for ids in devices.values():
        end_R = np.array([stays[i].end for i in ids])
        wall_R = np.array([stays[i].wall for i in ids])
        found |= zip(ids, shared(end_R - wall_R, end_R).tolist(), strict=True)
    return found


def shared(begin_R: np.ndarray, end_R: np.ndarray) -> np.ndarray:
    """Each run's share of one device's time, in seconds: a moment belongs to all runs of that moment alike."""
    cuts_K = np.unique(np.concatenate([begin_R, end_R]))
    begun_K, ended_K = (np.searchsorted(np.sort(ends), cuts_K[:-1], "right") for ends in (begin_R, end_R))
    at_work_K = np.maximum(begun_K - ended_K, 1)
    until_K = np.concatenate([[0.0], np.cumsum(np.diff(cuts_K) / at_work_K)])
    return until_K[np.searchsorted(cuts_K, end_R)] - until_K[np.searchsorted(cuts_K, begin_R)]


def together(share: float, wall: float) -> bool:
    """Whether others were there too: by what was a run's own and by its clock, or by the sums of several runs."""
    return bool(share < 0.99 * wall)
