"""A plan on one screen: a table of protocols, why runs are new, what is to pay, and what the seeds can show.

Long lists are cut with their number; `--json` has all of them. Plain text where the output is no terminal.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.plan.costs import Range
from bench.plan.effects import POWER, Effect
from bench.plan.graph import STATES
from bench.plan.why import Reason

if TYPE_CHECKING:
    from bench.plan.verb import Plan

LINES = 8  # of each list
NAMES = 4  # in one line


def show(plan: "Plan", path: Path, absent: str) -> None:
    """`absent`: what ends the first line if there is no results folder."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=160)
    counts = ", ".join(f"{n} {STATE_WORDS[state]}" for state, n in plan.states.items() if n or state in ALWAYS)
    console.print(f"{path}: {plan.runs} runs: {counts}{absent}")
    console.print(protocols(plan))
    for title, lines in (
        ("New because", [reason(r) for r in plan.new]),
        ("Given up", plan.failed),
        ("Other code", plan.other_code),
    ):
        if lines:
            console.print(title)
            for line in cut(lines):
                console.print(f"  {line}")
    for name, text in costs(plan):
        console.print(f"{name:<15}{text}")
    console.print(f"Smallest effect that is found with probability {POWER:g} (paired t, Holm, alpha {plan.alpha:g})")
    for line in cut(effect_lines(plan.effects)):
        console.print(f"  {line}")


STATE_WORDS = {state: state for state in STATES} | {"again": "to train again for their weights"}
ALWAYS = ("done", "running", "failed", "missing")


def protocols(plan: "Plan") -> Table:
    states = [s for s in STATES if s in ALWAYS or plan.states[s]]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("protocol")
    for state in ("runs", *states):
        table.add_column(state, justify="right")
    table.add_column("device time left")
    table.add_column("known from")
    for row in plan.rows:
        left = "-" if not row.sources else "unknown" if row.device_seconds is None else spread(row.device_seconds)
        numbers = [str(row.runs), *(str(row.states[s] or "-") for s in states)]
        origin = ", ".join(f"{source} {n}" for source, n in row.sources.items()) or "-"
        table.add_row(*(Text(t) for t in ("  " * row.depth + row.protocol, *numbers, left, origin)))
    return table


def reason(new: Reason) -> str:
    """'4 runs: protocol.budget.steps 595 -> 600 (mini_mrpc; attention, dense; nearest 047b7bcb0dcf)'."""
    nearest = f"; nearest {new.nearest}" if new.nearest else ""
    who = f"{names(new.protocols)}; {names(new.mixers)}{nearest}"
    return f"{count(new.runs, 'run')}: {new.text} ({who})"


def names(given: tuple[str, ...]) -> str:
    rest = f" and {len(given) - NAMES} more" if len(given) > NAMES else ""
    return ", ".join(given[:NAMES]) + rest


def costs(plan: "Plan") -> list[tuple[str, str]]:
    left, found = plan.totals, []
    if not plan.states["missing"] + plan.states["running"] + plan.states["again"]:
        return [("To do", "nothing")]
    if left.device_seconds is None:
        which = names(left.unknown)
        known = f"; the others {spread(left.known_device_seconds)}" if left.known_device_seconds.high else ""
        cure = "a pilot measures them: --pilot"
        found.append(("Device time", f"unknown: no record or pilot of {which}{known}; {cure}"))
        found += others(plan)
        found += sharing(left.shared)
        found += [("Wall time", "unknown"), ("Disk", "unknown")]
        return found
    device = f" on {plan.device}" if plan.device else ""
    found.append(("Device time", spread(left.device_seconds) + device))
    found += others(plan)
    found += sharing(left.shared)
    each, alone = (", each on a device of its own", "") if left.shared else ("", " alone")
    parallel = f"{plan.parallel} at a time{each}; the longest chain{alone} {spread(left.chain_seconds)}"
    found.append(("Wall time", f"{spread(left.wall_seconds)}, {parallel}"))
    lasting, most = left.disk_bytes
    found.append(("Disk", f"{size(lasting)} of weights and records, {size(most)} with checkpoints of those in hand"))
    return found


def others(plan: "Plan") -> list[tuple[str, str]]:
    """What else could have been reckoned from."""
    names = [name for name in plan.devices if name != plan.device]
    return [("", f"--device takes the costs of another: {', '.join(names)}")] if names else []


def sharing(runs: int) -> list[tuple[str, str]]:
    """What to know of the seconds of so many runs."""
    if not runs:
        return []
    whose = f"for {count(runs, 'run')} the seconds are shares of runs that had others beside them on their device"
    how = "each moment is split evenly, as in the report's Cost; how long a run takes alone there is not known"
    return [("Shared device", f"{whose}: {how}")]


def effect_lines(effects: list[Effect]) -> list[str]:
    """A line for each column with finished seeds, and one for all others that are alike."""
    lines, alike = [], {}
    for effect in effects:
        if effect.units:
            low, high = (f"{u:.3g}" for u in effect.units)
            reach = low if low == high else f"{low} to {high}"
            origin = f"SD of paired differences {effect.sd:.3g} from {effect.sd_seeds} finished seeds"
            lines.append(f"{effect.column}: {reach} ({origin}; {given(effect)})")
        else:
            alike.setdefault((effect.seeds, effect.comparisons, effect.sds, effect.tests_from), []).append(effect)
    for members in alike.values():
        which = names(tuple(e.column for e in members))
        lines.append(f"{which}: {in_sds(members[0])}")
    return lines


def in_sds(effect: Effect) -> str:
    if not effect.comparisons:
        return "unknown: one arm has nothing to be compared with"
    if effect.sds is None:
        return f"none: one seed has no spread to compare with (the report tests from {effect.tests_from} seeds on)"
    low, high = (f"{s:.2f}" for s in effect.sds)
    return f"{low if low == high else f'{low} to {high}'} SDs of paired differences ({given(effect)})"


def given(effect: Effect) -> str:
    few = f", the report tests from {effect.tests_from} on" if effect.seeds < effect.tests_from else ""
    return f"{count(effect.seeds, 'seed')}{few}, {count(effect.comparisons, 'comparison')}"


def cut(lines: list[str]) -> list[str]:
    """The first ones; what is left out is counted."""
    return lines if len(lines) <= LINES else [*lines[:LINES], f"and {len(lines) - LINES} more (--json has them)"]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spread(seconds: Range) -> str:
    """'2.4 h (2.0 to 3.1)', in the unit of the middle."""
    unit, each = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds.mid >= 1.5 * s), ("s", 1))
    low, mid, high = (f"{value / each:.1f}" if value / each < 100 else f"{value / each:.0f}" for value in seconds)
    return f"{mid} {unit}" if low == high else f"{mid} {unit} ({low} to {high})"


def size(number: float) -> str:
    """Decimal units."""
    unit, each = next(((u, b) for u, b in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if number >= b), ("kB", 1e3))
    return f"{number / each:.3g} {unit}"
