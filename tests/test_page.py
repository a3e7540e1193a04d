"""The page: it loads nothing, texts of records stay texts, numbers lead to their runs; and it works in a browser.

Records are fabricated (tests/pages.py). Tests marked `browser` drive a headless Chromium.
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

from bench import cli
from bench.report import analysis, details, html, links
from bench.report.sections import sections
from tests.pages import ARMS, HOSTILE, Reader, a_hostile_table, a_table, browser, island, text_of, write
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


def test_figures_are_embedded_each_once_as_vector_if_there_is_one(tmp_path):
    names = ("b.png", "b.pdf", "a.png", "a.svg", "c.pdf")
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_bytes(path.name.encode())
    found = html.embedded(paths)
    assert [name for name, _ in found] == ["b", "a"]
    kinds = [uri.split(";")[0] for _, uri in found]
    assert kinds == ["data:image/png", "data:image/svg+xml"]
    assert base64.b64decode(found[1][1].split(",")[1]) == b"a.svg"


def test_the_verb_writes_the_page_only_if_asked(tmp_path, monkeypatch, capsys):
    fill(tmp_path)
    where, path = f"where.results={tmp_path / 'results'}", tmp_path / "results" / "way" / "page.html"
    for words in ([], ["--html"]):
        monkeypatch.setattr(sys, "argv", ["mixerbench", "report", str(tmp_path / "way.yaml"), where, *words])
        assert cli.main() == 0
        assert path.exists() == bool(words) == (str(path) in capsys.readouterr().out.splitlines())
    assert "Does the whole way work?" in path.read_text(encoding="utf-8")


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
        assert len(buttons) == 6 and all(b.attributes["data-runs"].startswith(f"runs={place}/") for b in buttons)
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


# In a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    with browser() as driver:
        yield driver


@pytest.fixture
def opened(chromium, page):
    """The page on a desk, freshly loaded; whatever is done with it, the console must stay silent."""
    yield load(chromium, page, 1280)
    assert chromium.get_log("browser") == []


def load(driver, path: Path, width: int, address: str = ""):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get("about:blank")
    driver.get(f"file://{path}{address}")
    return driver


def js(driver, code: str, *arguments):
    return driver.execute_script(f"return {code}", *arguments)


def column(driver, place: int) -> list[str]:
    """Shown first words of a column of the wide table."""
    rows = "[...document.querySelectorAll('#table tbody tr:not([hidden])')]"
    return js(driver, f"{rows}.map(r => r.cells[{place}].innerText.trim().split(/\\s/)[0])")


def heads(driver) -> list:
    return driver.find_elements("css selector", "#table thead th")


@pytest.mark.browser
def test_it_opens_and_asks_for_nothing(opened):
    assert opened.title == "demo - mixerbench"
    assert js(opened, "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    image = "document.querySelector('#figures img')"
    assert js(opened, f"{image}.complete && {image}.naturalWidth") > 100


@pytest.mark.browser
def test_heads_sort_by_mouse_and_by_keyboard_and_say_how(opened):
    from selenium.webdriver.common.keys import Keys

    written = column(opened, 3)
    assert len(written) == 7
    button = heads(opened)[3].find_element("tag name", "button")
    button.click()
    assert (
        column(opened, 3) == sorted(written, key=float) and heads(opened)[3].get_attribute("aria-sort") == "ascending"
    )
    button.send_keys(Keys.ENTER)
    assert column(opened, 3) == sorted(written, key=float, reverse=True)
    assert heads(opened)[3].get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.SPACE)
    assert column(opened, 3) == written and heads(opened)[3].get_attribute("aria-sort") is None
    for _ in range(2):  # failed cells come last either way
        heads(opened)[5].find_element("tag name", "button").click()
        assert [text in ("1", "2") for text in column(opened, 5)] == [False] * 5 + [True] * 2
    heads(opened)[0].find_element("tag name", "button").click()
    assert column(opened, 0) == ["attention", "dense", *["low_rank"] * 5]
    assert [h.get_attribute("aria-sort") for h in heads(opened)].count(None) == len(heads(opened)) - 1


@pytest.mark.browser
def test_filters_hold_for_all_tables_and_are_undone(opened):
    from selenium.webdriver.support.ui import Select

    words = opened.find_element("name", "words")
    words.send_keys("LOW sam")
    assert column(opened, 0) == ["low_rank"] * 2 and column(opened, 1) == ["yes", "yes"]
    assert opened.find_element("css selector", "#filter output").text == "2 of 7 arms"
    first = "[...document.querySelectorAll('#section-1 tbody tr:not([hidden]) th')].map(h => h.innerText.trim())"
    assert js(opened, first) == ["low_rank SAM"]
    opened.find_element("css selector", "#filter button[type=reset]").click()
    assert len(column(opened, 0)) == 7
    Select(opened.find_element("name", "key-2")).select_by_visible_text("16")
    assert column(opened, 2) == ["16"]
    opened.find_element("css selector", "#filter button[type=reset]").click()
    opened.find_element("name", "failed").click()
    assert column(opened, 0) == ["dense", "attention"]
    Select(opened.find_element("name", "protocol")).select_by_visible_text("rough")
    shown = [h.text.split(":")[0] for h in heads(opened) if h.is_displayed()]
    assert "rough" in shown and "quick" not in shown and "mixer" in shown


@pytest.mark.browser
def test_a_number_opens_its_runs_and_a_run_all_that_its_record_says(opened, table):
    cell = opened.find_elements("css selector", "#table tbody tr")[5].find_elements("css selector", ".number")[2]
    assert "2 of 8 failed" in cell.text
    cell.click()
    drawer = opened.find_element("id", "drawer")
    assert drawer.is_displayed() and drawer.find_element("tag name", "h2").text == "attention SAM, rough: accuracy"
    rows = [r for r in table.rows if (r.protocol, r.mixer) == ("rough", ARMS[5])]
    lines = drawer.find_elements("css selector", "details.run > summary")
    assert [line.text.split("\n")[-1] for line in lines] == [row.run_id for row in rows]
    for line, row in zip(lines, rows, strict=True):
        record = row.record
        text = f"{record.metrics['accuracy']:#.5g}" if record.outcome == "ok" else f"{record.outcome}: {record.reason}"
        assert text in line.text
    lines[0].click()
    inside = drawer.find_element("css selector", "details.run[open]")
    assert yaml.safe_load(inside.find_element("tag name", "pre").get_attribute("textContent")) == rows[0].record.run
    curve = inside.find_element("css selector", "svg.chart path").get_attribute("d")
    assert len(re.findall("[ML]", curve)) == 60
    assert len(drawer.find_elements("css selector", "section.part > div > svg path")) == len(rows)
    for text in ("312 s", "9,748,481", "1,830 MiB", "2.13.0", "A processor", rows[0].record.hashes.batches):
        assert text in inside.text
    drawer.find_element("css selector", ".close").click()
    assert not drawer.is_displayed() and "runs" not in opened.current_url


@pytest.mark.browser
def test_a_pair_shows_its_differences_seed_by_seed(opened, table):
    opened.find_element("css selector", "#section-1 tbody tr:nth-child(3) .number").click()
    lines = opened.find_elements("css selector", "#drawer .part table tbody tr")
    shown = [float(line.find_elements("tag name", "td")[2].text) for line in lines]
    values = {
        (r.seed, r.mixer["name"]): r.record.metrics["accuracy"]
        for r in table.of("quick")
        if r.mixer in (ARMS[0], ARMS[3])
    }
    assert shown == pytest.approx([values[s, "low_rank"] - values[s, "dense"] for s in table.seeds], abs=1e-5)


# Closes the drawer, goes to an address, and gives whether the drawer is open then and how much it holds.
FOLLOW = """
const [address, done] = arguments, drawer = document.getElementById("drawer");
drawer.close();
setTimeout(() => {
  location.hash = address;
  setTimeout(() => done([drawer.open, drawer.querySelectorAll("summary, section").length]), 10);
}, 10);
"""


@pytest.mark.browser
def test_every_address_of_the_page_opens_its_runs_and_no_other_does(opened):
    addresses = js(opened, "[...new Set([...document.querySelectorAll('[data-runs]')].map(b => b.dataset.runs))]")
    assert len(addresses) > 30
    for address in addresses:
        is_open, parts = opened.execute_async_script(FOLLOW, address)
        assert is_open and parts > 0, address
    for address in ("runs=99/0", "runs=0/99", "runs=", "runs=0/0/%3Cb%3E%", "table"):
        is_open, _ = opened.execute_async_script(FOLLOW, address)
        assert not is_open, address


@pytest.mark.browser
def test_an_address_opens_with_the_page_and_back_closes_it(chromium, page, table):
    row = next(r for r in table.rows if r.record.outcome == "unfit")
    driver = load(chromium, page, 1280, f"#runs=0/2/{row.run_id}")
    assert row.run_id in driver.find_element("css selector", "details.run[open]").text
    driver.find_element("css selector", "#drawer .close").click()
    driver.find_element("css selector", "#table .number").click()
    assert driver.find_element("id", "drawer").is_displayed()
    driver.back()
    assert not driver.find_element("id", "drawer").is_displayed()
    assert driver.get_log("browser") == []


@pytest.mark.browser
def test_hostile_texts_are_shown_and_do_nothing(chromium, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(text_of(a_hostile_table(), []), encoding="utf-8")
    driver = load(chromium, path, 1280)
    for button in driver.find_elements("css selector", "#table .number"):
        js(driver, "arguments[0].click()", button)
        for line in driver.find_elements("css selector", "details.run > summary"):
            js(driver, "arguments[0].click()", line)
        assert "<img src=x" in driver.find_element("id", "drawer").text
        driver.find_element("css selector", "#drawer .close").click()
    assert js(driver, "window.pwned") is None
    assert js(driver, "document.querySelectorAll('img[src=x], body script:not([type])').length") == 0
    assert driver.get_log("browser") == []


@pytest.mark.browser
def test_it_reads_at_phone_width(chromium, page):
    driver = load(chromium, page, 390)
    assert js(driver, "innerWidth") == 390
    fits = "document.documentElement.scrollWidth <= 390 && document.body.scrollWidth <= 390"
    assert js(driver, fits)
    # Row heads stay in sight while a table scrolls, and say which of several arms of one mixer it is.
    js(driver, "document.querySelector('#table .scroll').scrollLeft = 400")
    head = driver.find_element("css selector", "#table tbody tr:nth-child(3) th")
    assert "rank 16" in head.text and 0 <= js(driver, "arguments[0].getBoundingClientRect().left", head) < 40
    texts = "[...document.querySelectorAll('body *')].filter(e => e.offsetParent && [...e.childNodes].some(isText))"
    is_text = "const isText = n => n.nodeType === Node.TEXT_NODE && n.data.trim();"
    sizes = driver.execute_script(f"{is_text} return {texts}.map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert len(sizes) > 100 and sorted(sizes)[5] >= 10 and sorted(sizes)[len(sizes) // 2] >= 12
    js(driver, "document.querySelector('#table .number').click()")
    driver.find_element("css selector", "details.run > summary").click()
    assert js(driver, fits) and js(driver, "document.getElementById('drawer').scrollWidth") <= 390
    assert driver.get_log("browser") == []
