"""A report in the terminal: the same tables as in Markdown, set by rich, as wide as the terminal is."""

from bench.report.frame import Table
from bench.report.tables import wide


def show(table: Table, analysis, sections: list, console) -> None:
    """Print the wide table, the other sections and their notes on a rich `console`."""
    head, lines, notes = wide(table, analysis)
    put(console, table.sweep.question, head, lines, 2, notes)
    for section in sections:
        put(console, section.title, section.head, section.lines, section.left, section.notes)


def put(console, title: str, head: list[str], lines: list[list[str]], left: int, notes: list[str]) -> None:
    from rich.table import Table as Set
    from rich.text import Text

    found = Set(title=Text(title), title_justify="left", show_lines=len(head) > 6)
    for place, text in enumerate(head):
        found.add_column(Text(text), justify="left" if place < left else "right")
    for line in lines:
        found.add_row(*(Text(text) for text in line))
    console.print(found)
    for note in notes:
        console.print(Text(f"- {note}"))
