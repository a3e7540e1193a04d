"""How large each mixer is as training starts, and by what its protocol scales it, from the records alone."""

import numpy as np

from bench.report.frame import Row, Table
from bench.report.sections import Section

TITLE = "Start of training"


def sections(table: Table) -> list[Section]:
    """One, an arm a line and pretraining protocol; none if all weights come from parents."""
    rows = list({r.run_id: r for r in table.rows if r.record.gain}.values())
    protocols = [p for p in table.protocols() if any(r.protocol == p for r in rows)]
    if not protocols:
        return []
    several = len(protocols) > 1
    head = ["arm", *["protocol"] * several, "gain", "over tokens", "scaled by"]
    lines = []
    for arm in table.arms:
        for protocol in protocols:
            own = [r for r in rows if (r.arm, r.protocol) == (arm.key, protocol)]
            lines.append([arm.label, *[protocol] * several, *cells(own)])
    notes = [
        "Gain: |M v| / |v| as the mixer comes, on the first examples; beside it the part that varies over tokens. "
        "Median (least to greatest) of the layers, and of their directions, of all seeds."
    ]
    if any(gain_of(r) for r in rows):
        notes.append(
            "Scaled by: the one fixed number a layer that brings the gain to the protocol's shell.gain. What passes a "
            "token on by itself, such as a free diagonal that starts at 1, counts in it, and leaves what mixes a "
            "smaller start."
        )
    return [Section(TITLE, head, lines, 1 + several, notes)]


def gain_of(row: Row) -> float:
    """The target of the row's protocol, departures of its arm included; 0: not calibrated."""
    return row.record.run["protocol"]["shell"]["gain"]


def cells(rows: list[Row]) -> list[str]:
    """The figures of an arm under one protocol, '-' where there is none."""
    found = np.array([g for r in rows for g in r.record.gain])
    varying = np.array([g for r in rows for g in r.record.gain_varying])
    scales = [gain_of(r) / g for r in rows for g in r.record.gain if gain_of(r) and g]
    return [spread(found), spread(varying), spread(np.array(scales))]


def spread(values: np.ndarray) -> str:
    """'0.064 (0.024 to 0.13)', two figures each."""
    if not len(values):
        return "-"
    middle, least, most = (short(v) for v in (np.median(values), values.min(), values.max()))
    return middle if least == most else f"{middle} ({least} to {most})"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
