"""The page in a headless Chromium: it opens, sorts, filters, leads to its runs, and reads at phone width.

Whatever is done with it, the console stays silent. Skipped where no Chromium is installed (tests/pages.py).
"""

import re
from pathlib import Path

import pytest
import yaml

from tests.pages import ARMS, a_hostile_table, a_table, browser, text_of, write

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def table():
    return a_table()


@pytest.fixture(scope="module")
def page(table, tmp_path_factory) -> Path:
    return write(table, tmp_path_factory.mktemp("page"))


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


def wait(driver, until) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20).until(until)


def column(driver, place: int) -> list[str]:
    """Shown first words of a column of the wide table."""
    rows = "[...document.querySelectorAll('#table tbody tr:not([hidden])')]"
    return js(driver, f"{rows}.map(r => r.cells[{place}].innerText.trim().split(/\\s/)[0])")


def heads(driver) -> list:
    return driver.find_elements("css selector", "#table thead th")


def test_it_opens_and_asks_for_nothing(opened):
    assert opened.title == "demo - mixerbench"
    assert js(opened, "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    image = "document.querySelector('#figures img')"
    assert js(opened, f"{image}.complete && {image}.naturalWidth") > 100


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
    assert not drawer.is_displayed()
    wait(opened, lambda driver: "runs" not in driver.current_url)


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
const [address, done] = arguments, drawer = document.getElementById("drawer"), once = { once: true };
function go() {
  addEventListener("hashchange", () => done([drawer.open, drawer.querySelectorAll("summary, section").length]), once);
  location.hash = address;
}
if (drawer.open) {
  drawer.addEventListener("close", go, once);
  drawer.close();
} else go();
"""


def test_every_address_of_the_page_opens_its_runs_and_no_other_does(opened):
    addresses = js(opened, "[...new Set([...document.querySelectorAll('[data-runs]')].map(b => b.dataset.runs))]")
    assert len(addresses) > 30
    for address in addresses:
        is_open, parts = opened.execute_async_script(FOLLOW, address)
        assert is_open and parts > 0, address
    for address in ("runs=99/0", "runs=0/99", "runs=", "runs=0/0/%3Cb%3E%", "table"):
        is_open, _ = opened.execute_async_script(FOLLOW, address)
        assert not is_open, address


def test_an_address_opens_with_the_page_and_back_closes_it(chromium, page, table):
    row = next(r for r in table.rows if r.record.outcome == "unfit")
    driver = load(chromium, page, 1280, f"#runs=0/2/{row.run_id}")
    assert row.run_id in driver.find_element("css selector", "details.run[open]").text
    driver.find_element("css selector", "#drawer .close").click()
    wait(driver, lambda driver: "runs" not in driver.current_url)  # the page hears of it a frame later
    driver.find_element("css selector", "#table .number").click()
    assert driver.find_element("id", "drawer").is_displayed()
    driver.back()
    wait(driver, lambda driver: not driver.find_element("id", "drawer").is_displayed())
    assert driver.get_log("browser") == []


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
