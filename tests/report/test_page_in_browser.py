"""What the page does in a real browser: sorts, filters, changes its theme, copies, and asks for nothing."""

import browser
import pytest

pytestmark = pytest.mark.skipif(browser.found() is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome)")

RATES = "#x-request_rate-records"
SIZES = "#x-model_size-records"


@pytest.fixture(scope="module")
def tab():
    with browser.opened(browser.found()) as page:
        yield page


@pytest.fixture
def page(tab, made):
    system(tab, "light")
    tab.send("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    tab.open(made / "report.html")
    yield tab
    tab.run("localStorage.clear()")
    assert errors(tab) == []


def system(page, theme: str) -> None:
    """What the reader's system asks of pages: a theme and, for tests to know where things are, no scrolling by and by."""
    wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    page.send("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wishes.items()])


def errors(page) -> list[str]:
    """What went wrong on the page since it was opened: exceptions, console errors, blocked or failed requests."""
    found = [str(p.get("exceptionDetails")) for m, p in page.events if m == "Runtime.exceptionThrown"]
    found += [str(p["args"]) for m, p in page.events if m == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert")]
    return found + [p["entry"]["text"] for m, p in page.events if m == "Log.entryAdded" and p["entry"]["level"] == "error"]


def column(page, table: str, index: int) -> list[str]:
    """The cells of a column as they stand, of rows that are shown."""
    rows = f"[...document.querySelectorAll('{table} tbody tr')].filter(r => r.offsetHeight > 0)"
    return page.run(f"{rows}.map(r => r.cells[{index}].textContent.trim())")


def test_nothing_is_asked_for_and_nothing_runs(page, made):
    asked = [p["request"]["url"] for m, p in page.events if m == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(made / "report.html").as_uri()]
    assert page.run("typeof window.owned") == "undefined"
    assert page.run("document.querySelectorAll('main script, main img[src^=http], [onerror], [onload], iframe').length") == 0
    assert "evil:<script>window.owned=1</script>(keep=3)" in column(page, SIZES, 0)


def test_a_click_on_a_head_sorts_by_it_and_another_turns_it_around(page):
    before = [float(text.replace(",", "")) for text in column(page, RATES, 3)]
    assert before != sorted(before)
    head = f"{RATES} thead th:nth-child(4)"
    page.click(f"{head} button")
    assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "ascending"
    assert [float(text.replace(",", "")) for text in column(page, RATES, 3)] == sorted(before)
    page.click(f"{head} button")
    assert [float(text.replace(",", "")) for text in column(page, RATES, 3)] == sorted(before, reverse=True)
    offered = f"{RATES} thead th:nth-child(2) button"
    page.click(offered)
    assert column(page, RATES, 1) == [rate for rate in ("2", "4", "8", "12", "∞") for _ in range(9)]


def test_a_cell_without_a_figure_stays_last_however_it_is_sorted(page):
    head = f"{SIZES} thead th:nth-child(4) button"
    for _ in range(2):
        page.click(head)
        assert column(page, SIZES, 3)[-2:] == ["–", "–"]
    assert column(page, SIZES, 3)[0] == "6.00"


def test_the_filter_and_the_chips_hide_rows_and_say_how_many_are_left(page):
    page.type(f"{RATES} input", "h2o paged")
    assert set(column(page, RATES, 0)) == {"h2o(heavy=0.1,recent=0.1)+paged"}
    assert page.run(f"document.querySelector('{RATES} output').textContent") == "15 of 45 cells"
    page.type(f"{RATES} input", " ")
    page.click(f"{RATES} .chip[data-s=full]")
    assert set(column(page, RATES, 0)) == {"vllm", "h2o(heavy=0.1,recent=0.1)+paged"}
    page.click(f"{RATES} .chip[data-s=full]")
    assert len(column(page, RATES, 0)) == 45


COLOURS = """(() => {
  const text = document.querySelector('#fig-pareto svg text'), style = getComputedStyle(text);
  const axis = [...document.querySelectorAll('#fig-pareto svg path')].find(p => p.getAttribute('style')?.includes('--grid'));
  const body = getComputedStyle(document.body);
  return [body.backgroundColor, body.color, style.fill, getComputedStyle(axis).stroke];
})()"""


def test_the_toggle_changes_colours_of_page_and_figures_and_is_remembered(page, made):
    light = page.run(COLOURS)
    page.click("#theme")
    dark = page.run(COLOURS)
    assert all(a != b for a, b in zip(light, dark, strict=True)), (light, dark)
    assert light[1] == light[2]
    assert dark[1] == dark[2]
    page.open(made / "report.html")
    assert page.run(COLOURS) == dark
    page.click("#theme")
    assert page.run(COLOURS) == light


def test_the_page_follows_the_system(page, made):
    light = page.run(COLOURS)
    system(page, "dark")
    assert all(a != b for a, b in zip(light, page.run(COLOURS), strict=True))
    assert page.run("document.querySelector('#theme span').textContent") == "light"


BOXES = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
  const inside = t => t.left > box.left - 4 && t.right < box.right + 4 && t.top > box.top - 4 && t.bottom < box.bottom + 4;
  return [box.width, box.height, texts.length, texts.every(t => t.width === 0 || inside(t))];
})"""


def test_every_figure_has_size_and_text_inside_it(page):
    boxes = page.run(BOXES)
    assert len(boxes) == 5
    for width, height, texts, inside in boxes:
        assert width > 400
        assert height > 150
        assert texts > 5
        assert inside
    names = page.run("[...document.querySelectorAll('#fig-pareto title')].map(t => t.textContent)")
    assert any(name.startswith("h2o(heavy=0.1,recent=0.1): mean time per output token (ms) 2.8; facts recalled") for name in names)


def test_links_of_the_contents_lead_somewhere_and_ids_are_no_one_elses(page):
    assert page.run("[...document.querySelectorAll('nav li a')].filter(a => !document.getElementById(a.hash.slice(1))).length") == 0
    assert page.run("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))") == 0
    hrefs = "[...document.querySelectorAll('svg use')].map(u => u.getAttribute('href'))"
    assert page.run(f"{hrefs}.filter(h => !document.getElementById(h.slice(1))).length") == 0
    assert page.run(f"{hrefs}.length") > 20


def test_a_phone_sees_no_page_wider_than_itself(page):
    page.send("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=2, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 375
    assert page.run("document.getElementById('contents').open") is False
