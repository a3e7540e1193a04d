"""The page: one file with the tables, the figures, the certificate, and every run behind every number.

It loads nothing, and its policy (Content-Security-Policy) forbids it to: only the style and the script whose hashes it
names are in force. All texts of records are escaped here or written by the script as text. Same records, same bytes.
"""

import base64
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from bench.report import details
from bench.report.analysis import Analysis
from bench.report.certificate import span
from bench.report.frame import LEVELS, Table, plain, seeds_text
from bench.report.links import ALL, Links
from bench.report.sections import Section, declared
from bench.report.tables import reasons, wide

HOME = Path(__file__).parent / "page"
SCRIPTS = ("chart.js", "runs.js", "tables.js")
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}  # of figures, the first that is there
PER_INCH = 122  # pixels of the page: small print of 7 points in a figure is as large as the notes
NUMBER = r"[<≤]? ?[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?M?"
SPREAD = r"± \S+|\[[^\[\]]*,[^\[\]]*\]"
CELL = re.compile(rf"({NUMBER})(?: ({SPREAD}))?(?: ?([a-z]+|[*°]))?")


@dataclass(frozen=True)
class Cell:
    text: str
    spread: str  # '± 0.01' or '[0.1, 0.2]'
    mark: str  # letters, '*' or '°'
    order: float | None  # what it sorts by; None: by its text, or last among numbers
    runs: str  # address of the runs behind it (links.py), or ''
    reason: str  # why runs failed
    protocol: str  # of its column, or ''


@dataclass(frozen=True)
class Row:
    arms: str  # places of its arms, for the filter; '' where it is of none
    dot: int | None  # arm whose colour it wears
    small: str  # what tells the arm from its namesakes, where a narrow page hides those columns
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """One table of the page."""

    anchor: str
    title: str
    head: list[tuple[str, str]]  # text, protocol
    rows: list[Row]
    left: int
    folded: int  # columns after the first that a narrow page hides
    notes: list[str]


def page(table: Table, analysis: Analysis, sections: list[Section], proof: dict, figures: list[Path]) -> str:
    """The whole file. `proof`: the certificate; `figures`: the files that the report drew, in all formats."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    room = Environment(
        loader=FileSystemLoader(HOME), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    room.filters |= {"ticked": ticked, "plain": plain, "breakable": breakable, "yaml": yaml_text, "order": order_text}
    links, runs = Links(table, analysis), details.island(table, analysis)
    main = main_grid(table, analysis, links)
    style = (HOME / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HOME / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return room.get_template("page.html").render(
        sweep=table.sweep,
        facts=facts(table, analysis),
        warnings=[n for n in main.notes if n.startswith("WARNING")],
        facets=facets(runs),
        arms=runs["arms"],
        main=main,
        grids=[grid(s, n, links, runs) for n, s in enumerate(sections, 1)],
        failures=failures(table),
        figures=embedded(figures),
        proof=proof,
        blocks={p: block_rows(values) for p, values in proof["protocols"].items()},
        agreed=agreed(proof),
        span=span,
        style=Markup(style),
        script=Markup(script),
        island=Markup(details.dump(runs)),
        style_hash=integrity(style),
        script_hash=integrity(script),
    )


def integrity(text: str) -> str:
    """As the browser takes it from what stands between the tags."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def ticked(text: str):
    """Escaped text whose `…` parts are code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    if len(parts) % 2 == 0:  # an odd tick is no code
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def breakable(text: str):
    """Escaped text that may be broken inside a long name: after '_', '=' and '.', before '['."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_=])|(?=\[)|(?<=[a-z]\.)", text))


def yaml_text(values) -> str:
    import yaml

    return yaml.dump(values, Dumper=details.Writer, allow_unicode=True, width=100)


# Head ---------------------------------------------------------------------------------------------------------------


def facts(table: Table, analysis: Analysis) -> list[tuple[str, str]]:
    """(name, value) of what a reader looks for first."""
    family = table.sweep.family
    failed = sum(r.record.outcome != "ok" for r in table.rows)
    found = [
        ("arms", str(len(table.arms))),
        ("seeds", f"{len(table.seeds)} ({', '.join(map(str, table.seeds))})"),
        ("runs", f"{len(table.rows)}, {f'{failed} failed' if failed else 'all ok'}"),
        ("primary", f"{table.primary.protocol}: {table.primary.metric.replace('_', ' ')}, alpha {family.alpha:g}"),
    ]
    if analysis.reference is not None:
        found.append(("reference", table.arms[analysis.reference].label))
    return [*found, ("comparisons", declared(table))]


def facets(runs: dict) -> list[tuple[int, str, list[str]]]:
    """(place, name, values) of the arms' keys that take several values."""
    found = []
    for place, name in enumerate(runs["axes"]):
        values = list(dict.fromkeys(arm["keys"][place] for arm in runs["arms"]))
        if len(values) > 1:
            found.append((place, name, values))
    return found


# Tables -------------------------------------------------------------------------------------------------------------


def main_grid(table: Table, analysis: Analysis, links: Links) -> Grid:
    """The wide table: its texts, sorted by the means behind them."""
    head, lines, notes = wide(table, analysis)
    left = 2 + len(table.axes)
    measured = {left + i: m for i, m in enumerate(analysis.measured)}
    rows = []
    for place, (arm, line) in enumerate(zip(table.arms, lines, strict=True)):
        cells = [word(text) for text in line[:left]]
        for i, text in enumerate(line[left:], left):
            one = measured.get(i)
            protocol = one.column.protocol if one else ""
            mean = float(one.values_AS[place].mean()) if one else math.nan
            why = reasons(table, arm.label, protocol) if one and one.column in table.columns and mean != mean else ""
            order = (None if mean != mean else mean) if one else order_of(text)
            cells.append(cell(text, links.address((place,), i - left if one else ALL), order, why, protocol))
        own = [LEVELS[arm.mixer["sam"]].label.strip() or "not SAM"]
        own += [f"{k} {plain(arm.mixer[k])}" for k in table.axes if k in arm.mixer]
        rows.append(Row(str(place), place, ", ".join(own), cells))
    titles = [(text, measured[i].column.protocol if i in measured else "") for i, text in enumerate(head)]
    return Grid("table", "", titles, rows, left, left - 1, notes)


def grid(section: Section, number: int, links: Links, runs: dict) -> Grid:
    columns = [links.column(text) for text in section.head]
    protocols = [links.analysis.measured[c].column.protocol if c is not None else "" for c in columns]
    rows = []
    for line, addresses in zip(section.lines, links.of(section), strict=True):
        arms = links.names.get(line[0], ())
        pieces = [word(t) for t in line[: section.left]]
        for text, runs_of, protocol in list(zip(line, addresses, protocols, strict=True))[section.left :]:
            pieces.append(cell(text, runs_of, order_of(text), "", protocol))
        rows.append(Row(" ".join(map(str, arms)), arms[0] if arms else None, "", pieces))
    head = list(zip(section.head, protocols, strict=True))
    return Grid(f"section-{number}", section.title, head, rows, section.left, 0, section.notes)


def failures(table: Table) -> Grid:
    """Every run that is not ok, and why."""
    head = [(text, "") for text in ("arm", "protocol", "seed", "outcome", "reason", "run")]
    places = {a.key: i for i, a in enumerate(table.arms)}
    columns = {p: next(i for i, c in enumerate(table.columns) if c.protocol == p) for p in table.protocols()}
    rows, several = [], len({r.replica for r in table.rows}) > 1
    for row in table.rows:
        if row.record.outcome != "ok":
            place = places[row.arm]
            seed = f"{row.seed}.{row.replica}" if several else str(row.seed)
            texts = (table.arms[place].label, row.protocol, seed, row.record.outcome, row.record.reason)
            address = f"runs={place}/{columns[row.protocol]}/{row.run_id}"
            cells = [*(word(t) for t in texts), Cell(row.run_id, "", "", None, address, "", "")]
            rows.append(Row(str(place), place, "", cells))
    return Grid("failures", "", head, rows, len(head), 0, [])


def word(text: str) -> Cell:
    return Cell(text, "", "", order_of(text), "", "", "")


def cell(text: str, runs: str, order: float | None, reason: str, protocol: str) -> Cell:
    found = CELL.fullmatch(text)
    number, spread, mark = found.groups("") if found else (text, "", "")
    return Cell(number, spread, mark, order, runs, reason, protocol)


def order_of(text: str) -> float | None:
    """The number that a text begins with; what grows with the length comes after all numbers."""
    if text.startswith("grows"):
        return math.inf
    found = re.match(NUMBER, text)
    if not found or "failed" in text:
        return None
    bare = found[0].lstrip("<≤ ").replace(",", "")
    value = float(bare.rstrip("M")) * (1e6 if bare.endswith("M") else 1)
    return value - 1e-12 if found[0].startswith("<") else value


def order_text(value: float) -> str:
    """As JavaScript reads it."""
    return "Infinity" if value == math.inf else repr(float(value))


# Figures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    name: str
    uri: str
    size: tuple[int, int] | None  # pixels of the page, so that letters are of one size in all figures


def embedded(paths: list[Path]) -> list[Figure]:
    """Each figure once: as SVG if it was written so, else as PNG."""
    found = {}
    for suffix, kind in KINDS.items():
        for path in (p for p in paths if p.suffix == suffix and p.stem not in found):
            uri = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
            found[path.stem] = Figure(path.stem.replace("_", " "), uri, size_of(path) if suffix == ".png" else None)
    return [found[stem] for stem in dict.fromkeys(p.stem for p in paths) if stem in found]


def size_of(path: Path) -> tuple[int, int]:
    """Width and height at PER_INCH pixels of the page an inch."""
    from PIL import Image

    with Image.open(path) as image:
        dpi = image.info.get("dpi", (PER_INCH, PER_INCH))
        return tuple(round(n * PER_INCH / d) for n, d in zip(image.size, dpi, strict=True))


# Certificate --------------------------------------------------------------------------------------------------------

EQUAL = ("shared initialisation", "batches", "optimiser groups")  # hashes of a block, in columns of their own


def block_rows(values: dict) -> list[dict]:
    """For each seed (and replica) of a protocol: the hashes that its arms agree on, and the arms that stand apart."""
    found = []
    for block in values["blocks"]:
        odd = {label: list(arm["differs"]) for label, arm in block["arms"].items() if arm["differs"]}
        idle = [label for label, arm in block["arms"].items() if not arm["trained"]]
        apart = [f"{label}: {', '.join(names)} (departure)" for label, names in odd.items()]
        apart += [f"{label}: not trained" for label in idle]
        place = f"{block['seed']}.{block['replica']}" if block["replica"] else str(block["seed"])
        hashes = [block["agreed"].get(name, "-") for name in EQUAL]
        found.append({"seed": place, "arms": len(block["arms"]), "hashes": hashes, "apart": "; ".join(apart)})
    return found


def agreed(proof: dict) -> list[tuple[str, str]]:
    """(what, value) of code, libraries and machine, equal within every seed; with several values also where each is."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for protocol, values in proof["protocols"].items():
        for block in values["blocks"]:
            for name, value in block["agreed"].items():
                if name not in EQUAL:
                    found.setdefault(name, {}).setdefault(value, {}).setdefault(protocol, []).append(block["seed"])
    lines = []
    for name, places in found.items():
        texts = [
            f"{value} ({'; '.join(f'{p}, {seeds_text(list(dict.fromkeys(s)))}' for p, s in where.items())})"
            for value, where in places.items()
        ]
        lines.append((name, next(iter(places)) if len(places) == 1 else ", ".join(texts)))
    return lines
