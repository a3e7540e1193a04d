"""`mixerbench report`: all that the room makes of a sweep's records, written into one folder.

The gate (frame.py) runs first; nothing is written for a table that it refuses. Same records, same files, bit for bit.
"""

from dataclasses import replace
from pathlib import Path

from bench.record import uncollected
from bench.report import (
    analysis,
    certificate,
    contrasts,
    cost,
    frame,
    items,
    latex,
    length_plot,
    orders,
    plots,
    published,
    start,
    suite,
    summary,
    tables,
    terminal,
    tuning,
    tuning_plot,
    tuning_text,
)
from bench.report.sections import sections
from bench.store import Store
from bench.sweep import Sweep


@uncollected()
def report(sweep: Sweep, store: Store, target: Path, console, html: bool = False) -> list[Path]:
    """Write tables (.md, .csv, .tex), summary.md, figures/ (.png, .pdf) and certificate.json into the folder `target`.

    `console`: a rich console to print the tables on, or None. `html`: write page.html too. Refuses (bench.Refusal)
    what is not a controlled comparison, and a sweep without one complete seed.
    """
    table = replace(frame.controlled(frame.rows(sweep, store), sweep), beside=cost.beside(store))
    tuned = tuning.tuned(table, store)
    table = tuning_text.marked(table, tuned)
    proof = certificate.certificate(table) | ({"tuning": tuning_text.proof(tuned)} if tuned else {})
    found = analysis.analyse(table, suite.floors(table, store))
    more = [*sections(table, found), *contrasts.sections(table, found), *tuning_text.sections(tuned)]
    more += [*items.sections(table, found, store), *published.beside(table, found), *orders.sections(table, found)]
    more += [*start.sections(table), cost.section(table)]
    texts = {
        "table.md": tables.markdown(table, found, more, [*certificate.short(proof), *tuning_text.short(tuned)]),
        "table.csv": tables.csv(table, found),
        "summary.md": summary.markdown(table, found, more),
        "comparisons.csv": tables.comparisons_csv(table, found),
        "table.tex": latex.fragment(table, found, more),
        "page.tex": latex.PAGE,
        "certificate.json": certificate.dump(proof),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    figures = plots.draw(table, found, target / "figures")
    figures += tuning_plot.draw(table, tuned, target / "figures") + length_plot.draw(table, found, target)
    pages = [target / "page.html"]
    if html:
        from bench.report.html import page

        pages[0].write_text(page(table, found, more, proof, figures), encoding="utf-8")
    else:  # one of an earlier report would stand beside other tables
        pages.pop().unlink(missing_ok=True)
    if console is not None:
        terminal.show(table, found, more, console)
    return [target / "table.md", target / "table.csv", *figures, *(target / name for name in list(texts)[2:]), *pages]
