"""The page: it loads nothing, texts of records stay texts, numbers lead to their runs; and what is on it is whole.

Records are fabricated (tests/pages.py); test_page_browser.py opens the page.
"""

import base64
import hashlib
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bench import cli
from bench.report import analysis, details, html, links
from bench.report.sections import sections
from tests.pages import ARMS, HOSTILE, Reader, a_hostile_table, a_table, island, text_of, write
from tests.test_report import fill


@pytest.fixture(scope="module")
def table():
    return a_table()


@pytest.fixture(scope="module")
def page(table, tmp_path_factory) -> Path:
    return write(table, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def tree(page):
    return Reader(page.read_text(encoding="utf-8")).top


def rows_of(tree, anchor: str) -> list:
    (section,) = [s for s in tree.all("section") if s.attributes["id"] == anchor]
    return section.all("tbody")[0].all("tr")


# The file -----------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_its_policy_lets_it_load_nothing(tree):
    """Every address is a place on the page or data in it; only this style and this script are in force."""
    nodes = [
        n for tag in ("a", "img", "link", "script", "iframe", "form", "object", "use", "svg") for n in tree.all(tag)
    ]
    for node in nodes:
        for key in ("src", "href", "action", "data", "xlink:href"):
            assert node.attributes.get(key, "#").startswith(("#", "data:")), node.attributes
    (style,), scripts = tree.all("style"), tree.all("script")
    assert "url(" not in style.text and "@import" not in style.text
    code = next(s.text for s in scripts if s.attributes["type"] == "module")
    assert not re.findall(r"fetch|XMLHttp|import |innerHTML|insertAdjacent|outerHTML|eval|document\.write", code)
    (policy,) = [m.attributes["content"] for m in tree.all("meta") if "http-equiv" in m.attributes]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules.pop("default-src"), rules.pop("img-src")) == ("'none'", "data:")
    for name, text in (("style-src", style.text), ("script-src", code)):
        assert rules.pop(name) == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert set(rules.values()) == {"'none'"}
    assert not [n for n in tree.all("td") + tree.all("svg") if "style" in n.attributes]  # the policy would refuse it


def test_texts_of_records_and_sweeps_stay_texts():
    text = text_of(a_hostile_table(), [])
    tree = Reader(text).top
    assert len(tree.all("script")) == 2 and len(tree.all("style")) == 1
    assert not [i for i in tree.all("img") if "src" in i.attributes]
    assert "onerror" not in {
        key for tag in ("svg", "td", "button", "option") for n in tree.all(tag) for key in n.attributes
    }
    assert HOSTILE.strip() in tree.all("h1")[0].text and "49" not in tree.all("h1")[0].text
    data = island(text)
    assert data["arms"][1]["label"].startswith("<script>window.pwned = 1</script>")
    run = next(r for r in data["runs"] if r["outcome"] == "diverged")
    assert run["reason"] == HOSTILE and run["environment"]["packages"] == {HOSTILE: HOSTILE}
    assert yaml.safe_load(run["config"])["mixer"][HOSTILE] == HOSTILE


def test_numbers_of_a_record_that_json_lacks_are_told_apart_from_zero(table):
    row = table.rows[0]
    odd = replace(row.record, metrics=row.record.metrics | {"other": math.nan}, curve=((1, 2.0), (2, math.inf)))
    data = island(text_of(replace(table, rows=(replace(row, record=odd), *table.rows[1:])), []))
    assert data["runs"][0]["metrics"]["other"] is None and data["runs"][0]["losses"] == [2.0, None]


def test_a_run_keeps_what_its_record_holds(table, page):
    runs = {run["id"]: run for run in island(page.read_text(encoding="utf-8"))["runs"]}
    assert len(runs) == len(table.rows)
    for row in table.rows:
        run, record = runs[row.run_id], row.record
        assert yaml.safe_load(run["config"]) == record.run
        assert run["metrics"] == record.metrics and (run["outcome"], run["reason"]) == (record.outcome, record.reason)
        assert run["cost"] == vars(record.cost) and run["capacity"] == vars(record.capacity)
        assert run["environment"] == vars(record.environment) and run["hashes"] == vars(record.hashes)
        assert run["steps"] == [step for step, _ in record.curve]
        assert run["losses"] == pytest.approx([loss for _, loss in record.curve], rel=5e-4)


def test_a_further_run_costs_less_than_a_kilobyte(table):
    """So that ten thousand runs of 60 points make a page of ten megabytes at most."""
    sizes = [len(details.dump(details.island(t, analysis.analyse(t, {})))) for t in (a_table(4), a_table(12))]
    assert (sizes[1] - sizes[0]) / (8 * len(ARMS) * 2) < 1000


def test_figures_are_embedded_each_once_as_vector_if_there_is_one_and_in_one_scale(tmp_path):
    paths = [tmp_path / name for name in ("wide_b.png", "wide_b.pdf", "a.png", "a.svg", "narrow.png", "c.pdf")]
    for path in paths:
        path.write_bytes(path.name.encode())
    for path, inches in ((paths[0], 6), (paths[4], 3)):
        Image.new("RGB", (300 * inches, 600)).save(path, dpi=(300, 300))
    found = html.embedded(paths)
    assert [f.name for f in found] == ["wide b", "a", "narrow"]
    assert [f.uri.split(";")[0] for f in found] == ["data:image/png", "data:image/svg+xml", "data:image/png"]
    assert base64.b64decode(found[0].uri.split(",")[1]) == paths[0].read_bytes()
    assert found[0].size[0] == 2 * found[2].size[0] and found[0].size[1] == found[2].size[1] and found[1].size is None


def test_the_verb_writes_the_page_only_if_asked(tmp_path, monkeypatch, capsys):
    fill(tmp_path)
    where, path = f"where.results={tmp_path / 'results'}", tmp_path / "results" / "way" / "page.html"
    for words in ([], ["--html"], []):  # the last would leave a page beside newer tables
        monkeypatch.setattr(sys, "argv", ["mixerbench", "report", str(tmp_path / "way.yaml"), where, *words])
        assert cli.main() == 0
        assert path.exists() == bool(words) == (str(path) in capsys.readouterr().out.splitlines())
        assert not words or "Does the whole way work?" in path.read_text(encoding="utf-8")


# Numbers and runs ---------------------------------------------------------------------------------------------------


def value_behind(address: str, data: dict) -> list[float]:
    """Mean over seeds of each arm of an address; NaN where a run failed."""
    arms, column = re.fullmatch(r"runs=([\d,]+)/(\d+)", address).groups()
    ((protocol, metric),) = data["columns"][int(column)]["parts"]
    found = []
    for arm in map(int, arms.split(",")):
        runs = [r for r in data["runs"] if (r["arm"], r["protocol"]) == (arm, protocol)]
        found.append(np.mean([r["metrics"].get(metric, math.nan) for r in runs]))
    return found


def test_every_number_of_the_wide_table_is_the_mean_of_the_runs_it_leads_to(tree, page):
    data, checked = island(page.read_text(encoding="utf-8")), 0
    for place, row in enumerate(rows_of(tree, "table")):
        buttons = [b for cell in row.inside for b in cell.all("button")]
        assert len(buttons) == 7 and all(b.attributes["data-runs"].startswith(f"runs={place}/") for b in buttons)
        for button in buttons[:3]:
            (mean,) = value_behind(button.attributes["data-runs"], data)
            shown = button.all("span")[0].text
            assert (f"{mean:.3f}" == shown) if mean == mean else ("failed" in shown)
            checked += 1
    assert checked == 21


def test_every_number_of_the_differences_is_that_of_the_two_arms_it_leads_to(tree, page):
    data, checked = island(page.read_text(encoding="utf-8")), 0
    for title in ("Difference from dense", "SAM minus not SAM", "A/A: the same mixer with other initial values"):
        (section,) = [s for s in tree.all("section") if s.all("h2")[0].text == title]
        for button in section.all("tbody")[0].all("button"):
            first, second = value_behind(button.attributes["data-runs"], data)
            gap = first - second
            shown = button.all("span")[0].text
            assert (f"{gap:+.3f}" == shown or float(shown) == 0) if gap == gap else ("failed" in shown)
            checked += 1
    assert checked == 7 * 3


def test_no_number_of_a_section_is_without_its_runs(table):
    found = analysis.analyse(table, {})
    every, ways = sections(table, found), links.Links(table, found)
    titles = " ".join(s.title for s in every)
    assert "by rank" in titles and "Over 2 tasks" in titles and "Tests of SAM" in titles
    for section in every:
        for line, addresses in zip(section.lines, ways.of(section), strict=True):
            bare = [t for t, a in list(zip(line, addresses, strict=True))[section.left :] if t != "-" and not a]
            assert not bare, (section.title, line)


def test_a_response_leads_to_the_arm_and_the_column_of_its_value():
    from bench.report.frame import controlled
    from tests.test_report import DENSE, LOW, LOW_SAM, a_row, a_sweep

    arms = (DENSE, LOW, {**LOW, "rank": 16}, LOW_SAM)
    rows = [
        a_row(m, s, 0.5 + i / 10 + n / 100, {"task.patch": n}, label=f"quick[task.patch={n}]")
        for n in (4, 1)
        for i, m in enumerate(arms)
        for s in (0, 1)
    ]
    family = replace(a_sweep().family, primary=replace(a_sweep().columns[0], protocol="quick[task.patch=4]"))
    table = controlled(rows, a_sweep(varies={"task.patch": [4, 1]}, family=family))
    found = analysis.analyse(table, {})
    ways, every = links.Links(table, found), {s.title: s for s in sections(table, found)}
    by_rank = every["quick[task.patch=4]: accuracy by rank"]
    assert by_rank.head == ["rank", "low_rank", "low_rank SAM"] and [line[0] for line in by_rank.lines] == ["8", "16"]
    assert ways.of(by_rank) == [["", "runs=1/0", "runs=3/0"], ["", "runs=2/0", ""]]
    by_patch = every["quick: accuracy by task.patch"]
    assert ways.of(by_patch)[1] == ["", "runs=0/1", "runs=1/1", "runs=2/1", "runs=3/1"]
    along_rank = every["quick[task.patch=4]: accuracy, its change along rank"]
    assert along_rank.head == ["rank", "low_rank"] and ways.of(along_rank) == [["", "runs=2,1/0"]]
    assert ways.of(every["quick: accuracy, its change along task.patch"]) == [
        ["", *(f"runs={i}/all" for i in range(4))]
    ]


def test_failed_cells_give_their_reasons_and_every_failed_run_is_listed(tree):
    (dense,) = [r for r in rows_of(tree, "table") if r.inside[0].whole() == "dense not SAM"]
    failed = [b for b in dense.all("button") if "failed" in b.attributes["class"]]
    assert len(failed) == 1 and "unfit: loss is not finite at step 40 (seed 3)" in failed[0].whole()
    lines = [[cell.whole() for cell in row.inside][:5] for row in rows_of(tree, "failures")]
    assert sorted(lines) == [
        ["attention SAM", "rough", "3", "diverged", "loss is not finite at step 40"],
        ["attention SAM", "rough", "6", "diverged", "loss is not finite at step 40"],
        ["dense", "rough", "3", "unfit", "loss is not finite at step 40"],
    ]


def test_the_certificate_on_the_page_holds_the_hashes_of_every_block(tree, table):
    (section,) = [s for s in tree.all("section") if s.attributes["id"] == "certificate"]
    shown = section.whole()
    for row in table.rows:
        for value in vars(row.record.hashes).values():
            assert value in shown
    assert table.sweep.registration in shown and "A processor" in shown and "2.13.0" in shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.475", 0.475),
        ("-0.002 [-0.011, +0.008]", -0.002),
        ("202,752", 202752),
        ("10.44M to 10.54M", 10.44e6),
        ("< 0.001", pytest.approx(0.001)),
        ("1 of 10 failed", None),
        ("-", None),
        ("grows", math.inf),
        ("differs", None),
        ("9 of 10", 9),
    ],
)
def test_a_cell_sorts_by_the_number_it_begins_with(text, value):
    assert html.order_of(text) == value
