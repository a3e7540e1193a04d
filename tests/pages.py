"""Made-up tables for the tests of the page, the page's parts as a reader of HTML sees them, and a headless Chromium."""

import importlib.util
import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from bench.record import Cost
from bench.report import analysis, certificate, frame, html
from bench.report.frame import Table, controlled
from bench.report.sections import sections
from bench.sweep import Column, Departure, Family
from tests.test_report import ATTENTION, DENSE, LOW, LOW_SAM, a_row, a_sweep
from tests.test_report_statistics import noisy_rows

WIDER = {**LOW, "rank": 16}
CROSSED = {**LOW_SAM, "sam": "misaligned"}
TWIN = {**LOW_SAM, "salt": 1}
ARMS = (DENSE, LOW, WIDER, LOW_SAM, CROSSED, ATTENTION, TWIN)
COLUMNS = (Column("quick", "accuracy"), Column("quick", "loss"), Column("rough", "accuracy"))
FAILED = {("rough", 5, 3): "diverged", ("rough", 5, 6): "diverged", ("rough", 0, 3): "unfit"}  # protocol, arm, seed


def a_table(seeds: int = 8, reason: str = "loss is not finite at step 40") -> Table:
    """Seven arms (an axis, all levels of SAM, an A/A arm), two protocols, three failed runs, curves of 60 points."""
    sweep = a_sweep(seeds=tuple(range(seeds)), columns=COLUMNS)
    rows, draw = [], np.random.default_rng(1)
    for label, patch, means in (("quick", 2, {3: 0.55, 5: 0.56, 6: 0.55}), ("rough", 4, {3: 0.6, 5: 0.58, 6: 0.6})):
        changes = {"task.patch": patch}
        for row in noisy_rows(means, seeds, ARMS, label=label, changes=changes):
            outcome = FAILED.get((label, ARMS.index(row.mixer), row.seed), "ok")
            if outcome != "ok":
                row = a_row(row.mixer, row.seed, 0.5, changes, outcome, label)
            losses = 0.4 + 1.8 * np.exp(-np.arange(60) / 18) + 0.03 * draw.normal(size=60)
            curve = tuple((5 * (i + 1), float(loss)) for i, loss in enumerate(losses))[: 60 if outcome == "ok" else 8]
            cost = Cost(312.2, 3.1, 1.2, 8.4, 0.0212, 0.0234, 0.0311, 1919348224, 9748481)
            own = {"curve": curve, "cost": cost, "registration": sweep.registration}
            own |= {"reason": reason} if outcome != "ok" else {}
            rows.append(replace(row, record=replace(row.record, **own)))
    return controlled(rows, sweep)


HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\"'`{{ 7 * 7 }}\u2028"


def a_hostile_table() -> Table:
    """Texts that would be markup, scripts or templates, wherever a record or a sweep can put text."""
    named = {"name": f"<script>window.pwned = 1</script>{HOSTILE}", "sam": False, "heads": 2, HOSTILE: HOSTILE}
    label, metric = f"quick{HOSTILE}", f"accuracy{HOSTILE}"
    rows = []
    for mixer in (DENSE, named, {**named, HOSTILE: "other"}):
        for seed in (0, 1):
            outcome = "diverged" if mixer != DENSE and seed else "ok"
            changes = {"backbone.width": 40} if mixer == DENSE else {}
            row = a_row(mixer, seed, 0.5, changes | {"task.name": HOSTILE}, outcome, label)
            record = row.record
            environment = replace(record.environment, device=HOSTILE, packages={HOSTILE: HOSTILE})
            digests = record.digests | {HOSTILE: HOSTILE}
            metrics = {metric: 0.5, "loss": 1.0} if outcome == "ok" else {}
            changes = {"environment": environment, "digests": digests, "metrics": metrics, "registration": HOSTILE}
            changes |= {"reason": HOSTILE if outcome != "ok" else ""}
            rows.append(replace(row, record=replace(record, **changes)))
    column = Column(label, metric)
    family = Family({"name": "dense"}, ("reference",), column, 0.0, 0.05)
    departure = Departure({"name": "dense"}, {"backbone.width": 40}, HOSTILE)
    sweep = a_sweep(name=HOSTILE, question=HOSTILE, columns=(column,), family=family, departures=(departure,))
    return controlled(rows, sweep)


def text_of(table: Table, figures: list[Path]) -> str:
    found = analysis.analyse(table, {})
    return html.page(table, found, sections(table, found), certificate.certificate(table), figures)


def write(table: frame.Table, folder: Path) -> Path:
    """The page of a table and a figure, as the report writes it."""
    Image.new("RGB", (640, 320), "white").save(folder / "figure.png")
    path = folder / "page.html"
    path.write_text(text_of(table, [folder / "figure.png"]), encoding="utf-8")
    return path


@dataclass
class Node:
    tag: str
    attributes: dict
    text: str = ""
    inside: list["Node"] = field(default_factory=list)

    def all(self, tag: str) -> list["Node"]:
        found = [self] if self.tag == tag else []
        return found + [n for child in self.inside for n in child.all(tag)]

    def whole(self) -> str:
        """Text of the node and of all in it, spaces joined."""
        return " ".join(" ".join([self.text, *(child.whole() for child in self.inside)]).split())


class Reader(HTMLParser):
    """The page as a tree; a tag that is not closed, or closed twice, is an error."""

    EMPTY = ("meta", "link", "img", "input", "wbr")

    def __init__(self, text: str):
        super().__init__()
        self.top = Node("", {})
        self.open = [self.top]
        self.feed(text)
        assert self.open == [self.top]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.open[-1].inside.append(node)
        if tag not in self.EMPTY and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inside.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].text += data


def island(text: str) -> dict:
    """What the page's script reads, pooled values put back into the runs."""
    (node,) = [s for s in Reader(text).top.all("script") if s.attributes["type"] == "application/json"]
    values = json.loads(node.text)
    runs = [dict(zip(values["fields"], run, strict=True)) for run in values["runs"]]
    for run in runs:
        run |= {name: values["pool"][run[name]] for name in values["pooled"]}
        run["config"] = "".join(values["pool"][place] for place in run["config"])
    return values | {"runs": runs}


# Chromium -----------------------------------------------------------------------------------------------------------

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def no_browser() -> str:
    """Why there can be no browser here, '' if there can."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        return f"Chromium is not installed (no {', '.join(missing)})"
    return "" if importlib.util.find_spec("selenium") else "selenium is not installed"


@contextmanager
def browser():
    """A headless Chromium with a profile of its own that keeps what its console says."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()
