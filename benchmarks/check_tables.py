"""The rows of `mixerbench check --json` as Markdown: a table a mixer, a column for each of its levels and forms.

Command: python benchmarks/check_tables.py gpu/check.json [more.json ...] > results/check/h200.md
A later file's mixers replace an earlier one's. A figure that fails is bold; a dash stands for a row that was skipped.
"""

import json
import sys
from itertools import groupby
from pathlib import Path


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["verdict"] == "skip":
        return "-"
    figure = row["figure"]
    said = figure if isinstance(figure, str) else "" if figure is None else f"{figure:.3g}"
    return f"**{said or 'fail'}**" if row["verdict"] == "fail" else said or row["verdict"]


def table(forms: dict[str, list[dict]]) -> list[str]:
    """Lines of one mixer's table: its properties in the order in which `check` has them."""
    by_form = [{row["property"]: row for row in rows} for rows in forms.values()]
    names = list(dict.fromkeys(name for rows in by_form for name in rows))
    lines = [["property", *(label.partition(" ")[2] for label in forms)], [":-", *("-:" for _ in forms)]]
    lines += [[name, *(cell(rows.get(name)) for rows in by_form)] for name in names]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    found = {}
    for path in sys.argv[1:]:
        found |= json.loads(Path(path).read_text())
    rows = [row for form in found.values() for row in form]
    verdicts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("pass", "fail", "skip")}
    print(f"# {len(found)} mixers and forms: {', '.join(f'{count} {name}' for name, count in verdicts.items())}\n")
    print("Made of `mixerbench check NAME where.device=cuda --json` (all: `make gpu`) by benchmarks/check_tables.py;")
    print("`mixerbench check` says what a row asks.")
    for name, group in groupby(found, key=lambda label: label.partition(" ")[0]):
        print(f"\n## {name}\n", *table({label: found[label] for label in group}), sep="\n")


if __name__ == "__main__":
    main()
