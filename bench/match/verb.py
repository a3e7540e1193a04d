"""The verb: the table of all rows, as text or JSON, and the yaml files of the mixers that met the budget."""

import dataclasses
import json
import re
import sys
from pathlib import Path

from bench import Refusal
from bench.config import listed
from bench.match.rows import Row, parse_words, table, text_of
from bench.match.solve import FIGURES, NEAR, USUAL, Budget, budget_like, figure_of, matched_all, met, parse_budget


def match(words: list[str], budget: str, like: str, by: str, knob: str, out: Path | None, as_json: bool) -> int:
    """Print the table (for a terminal, else as Markdown, or as JSON) and write the matched mixers' yaml to `out`."""
    protocol, common, arms = parse_words(words)
    if budget and like:
        raise Refusal("--budget and --like both set the budget; give one of them")
    if by and not like:
        raise Refusal("--by says which figure of --like is matched; a budget names its own: --budget flops=…")
    if (knob or out) and not (budget or like):
        raise Refusal(f"{'--out' if out else '--knob'} needs a budget: --budget parameters=… or --like MIXER")
    there = out and next(above for above in (out, *out.parents) if above.exists())
    if there and not there.is_dir():
        raise Refusal(f"--out {out}: {there} is a file; name a folder, which need not be there yet")
    goal = budget_like(like, by or USUAL, protocol, common) if like else parse_budget(budget) if budget else None
    found = table(protocol, common, arms)
    rows = matched_all(found, goal, knob) if goal else [row for _, row in found]
    paths = write(rows, goal, out) if goal and out else []
    if as_json:
        print(json.dumps(plain(rows, goal), indent=1))
    else:
        show(rows, goal)
    for path in paths:
        print(path, file=sys.stderr if as_json else sys.stdout)
    return 0


RIGHT = ("parameters", "mixer's own", "FLOPs", "state/head", "gap")


def title(rows: list[Row], budget: Budget | None) -> str:
    lengths = listed(sorted({row.length for row in rows if row.length}))
    labels = list(dict.fromkeys(row.protocol for row in rows))
    # Where several stand in a column of their own, the title has what they share.
    first = f"{labels[0] if len(labels) == 1 else labels[0].split('[')[0]}: {lengths} tokens"
    if budget is None:
        return first
    source = f", as {budget.like}" if budget.like else ""
    return f"{first}; budget: {budget.figure} {budget.value:,.0f}{source}"


def cells(rows: list[Row], budget: Budget | None) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table as text; columns that say nothing are left out."""
    head = ["mixer", "keys", "protocol", "parameters", "mixer's own", "FLOPs", "state/head", "moved", "gap", "note"]
    lines = []
    for row in rows:
        counts = [""] * 4
        if row.capacity:
            counts = [f"{getattr(row.capacity, name):,}" for name in FIGURES.values()]
            counts[3] = "grows" if row.capacity.state_per_head < 0 else counts[3]
        moved = ""
        if row.knob:
            stays = row.args[row.knob] == row.was
            moved = f"{row.knob} stays {row.was}" if stays else f"{row.knob} {row.was} to {row.args[row.knob]}"
        gap = "" if row.gap is None else f"{row.gap:+.2f} %"
        lines.append([row.name, text_of(row.args), row.protocol, *counts, moved, gap, row.note])
    same = len({row.protocol for row in rows}) == 1
    kept = [i for i, name in enumerate(head) if any(line[i] for line in lines) and not (same and name == "protocol")]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in lines]


def show(rows: list[Row], budget: Budget | None) -> None:
    """A drawn table on a terminal, Markdown elsewhere."""
    head, lines = cells(rows, budget)
    right = [name in RIGHT for name in head]
    if not sys.stdout.isatty():
        print(title(rows, budget), end="\n\n")
        for line in (head, ["---:" if at else ":---" for at in right], *lines):
            print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title(rows, budget)), title_justify="left")
    for name, at in zip(head, right, strict=True):
        drawn.add_column(name, justify="right" if at else "left", no_wrap=at)
    for line in lines:
        drawn.add_row(*map(Text, line))  # not as markup: labels hold brackets
    Console().print(drawn)


def plain(rows: list[Row], budget: Budget | None) -> dict:
    """The table for machines: figures under their names in a record."""
    return {
        "budget": None if budget is None else dataclasses.asdict(budget),
        "rows": [{**dataclasses.asdict(row), "met": None if budget is None else met(row)} for row in rows],
    }


def files(rows: list[Row], budget: Budget) -> dict[str, str]:
    """Name -> text of a complete mixer yaml for each row that met the budget.

    Several rows of one mixer are told apart by the keys in which they differ.
    """
    found = {}
    for row in filter(met, rows):
        kin = [other for other in rows if other.name == row.name and met(other)]
        parts = [f"{k}-{v}" for k, v in row.args.items() if k != row.knob and len({str(o.args[k]) for o in kin}) > 1]
        parts += [row.protocol] if len({other.protocol for other in kin}) > 1 else []
        stem = re.sub(r"\W+", "-", "-".join((row.name, *map(str.lower, parts)))).strip("-")
        found[f"{stem}.yaml"] = yaml_of(row, budget)
    return found


def yaml_of(row: Row, budget: Budget) -> str:
    values = {"name": row.name, **row.args}
    source = f", as {budget.like}" if budget.like else ""
    return "\n".join(
        (
            f"# Matched under {row.protocol}, {row.length} tokens: {budget.figure} "
            f"{figure_of(row.capacity, budget.figure):,}, {row.gap:+.2f} % of the budget {budget.value:,.0f}{source}.",
            f"# As one of a sweep's mixers: {json.dumps(values)}",
            *(f"{key}: {json.dumps(value)}" for key, value in values.items()),
            "",
        )
    )


def write(rows: list[Row], budget: Budget, out: Path) -> list[Path]:
    """Write all files or none; one that is there already is refused."""
    texts = {out / name: text for name, text in files(rows, budget).items()}
    if not texts:
        raise Refusal(f"no mixer comes within {NEAR:g} % of the budget, nothing is written to {out}")
    if there := [str(path) for path in texts if path.exists()]:
        raise Refusal(f"{listed(there)}: there already; delete what is old or name another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        with path.open("x") as file:
            file.write(text)
    return list(texts)
