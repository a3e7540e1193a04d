"""Panels of one metric under several variants of a protocol, as in 'table2_mini[shell.gain=0.0]': one scale for all."""

import itertools

from bench.sweep import Column


def variants(columns: list[Column]) -> int:
    """How many variants of its protocol each metric has, one after the other; 1 if not all have as many."""
    runs = [(key, len(list(of))) for key, of in itertools.groupby(columns, key=without_variant)]
    even = len(dict(runs)) == len(runs) and len({n for _, n in runs}) == 1
    return runs[0][1] if even else 1


def without_variant(column: Column) -> tuple[str, str]:
    return column.protocol.partition("[")[0], column.metric


def shared(columns: list[Column], limits: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Limits that show all variants of a column on one scale."""
    every: dict[tuple, list[tuple[float, float]]] = {}
    for column, ends in zip(columns, limits, strict=True):
        every.setdefault(without_variant(column), []).append(ends)
    both = {key: (min(low for low, _ in of), max(high for _, high in of)) for key, of in every.items()}
    return [both[without_variant(column)] for column in columns]
