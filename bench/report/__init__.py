"""The report room: from records to a table, a figure and the proof that the table is fair. It reads nothing else.

The gate (frame.py) runs first; nothing is written for a table that it refuses. Same records, same files, bit for bit.
"""

from pathlib import Path

from bench.report import certificate, frame, plots, tables
from bench.store import Store
from bench.sweep import Sweep


def report(sweep: Sweep, store: Store, target: Path) -> list[Path]:
    """Write the sweep's table.md, table.csv, figure.png, figure.pdf and certificate.json into the folder `target`.

    Refuses (bench.Refusal) what is not a controlled comparison, and a sweep without one complete seed.
    """
    table = frame.controlled(frame.rows(sweep, store), sweep)
    proof = certificate.certificate(table)
    target.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": tables.markdown(table, certificate.short(proof)),
        "table.csv": tables.csv(table),
        "certificate.json": certificate.dump(proof),
    }
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    figures = [target / "figure.png", target / "figure.pdf"]
    plots.draw(table, figures)
    return [target / "table.md", target / "table.csv", *figures, target / "certificate.json"]
