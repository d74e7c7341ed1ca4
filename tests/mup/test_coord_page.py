"""The coordinate check's page: what it holds, and how a browser shows it."""

import re
from html.parser import HTMLParser

import pytest

from crystal.mup.coord_page import page
from tests.chromium import Chromium, find_or_skip
from tests.mup.drawn_checks import NAMES, made_check

SCRIPT, LONG = "<script>document.title='taken over'</script>", "blocks.0." + "very_long_name_" * 20
MADE = {"command": "crystal coord-check amber --out '<b>'", "crystal": "0.4.0", "date": "2026-11-30 04:00 UTC"}


def the_page() -> str:
    powers = dict.fromkeys(NAMES[:6], 1.0) | {SCRIPT: 0.5, LONG: 2.0}
    broken = made_check(powers, label=f"{SCRIPT}, sp")
    broken.notes.append("a note & more")
    return page([broken, made_check({}, "amber, mup")], f"Coordinate check of {SCRIPT}", MADE)


class Reader(HTMLParser):
    """Table rows as text, all text, and every address that the page names."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.text, self.addresses, self.tags = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1] and "table" in self.tags:
            self.rows[-1][-1] += data


def test_the_page_holds_all_rows_worst_first_and_all_failures():
    reader = Reader(the_page())
    verdicts = [row[0] for row in reader.rows[1:]]
    assert len(verdicts) == 4 * 12
    assert verdicts == ["FAIL"] * 32 + ["PASS"] * 16
    assert reader.rows[1][1].startswith("blocks.0.very_long_name_")
    listed = reader.text[reader.text.index("What is wrong") : reader.text.index("Against width")]
    for name in (*NAMES[:6], SCRIPT, LONG):
        assert f"{name}.weight" in listed, "the faults name every tensor that has them"


def test_the_page_says_how_it_was_made_and_what_is_measured():
    text = Reader(the_page()).text
    for fact in (*MADE.values(), "lr 0.00125", "fp32", "4 x 64 random words", "2 seeds", "a note & more"):
        assert fact in text
    for word in ("rms of weights, at init", "mean |output|, step 4", "Mean absolute value", "Root mean square"):
        assert word in text
    assert "Features are learned" not in text, "no row is about a change"


def test_the_page_needs_nothing_else_and_takes_no_names_for_markup():
    text = the_page()
    reader = Reader(text)
    assert reader.addresses == []
    assert not re.search(r"https?:|@import|url\(", text)
    assert reader.tags.count("script") == 1
    assert "<b>'" not in text
    assert text.count("<html lang=") == text.count('name="viewport"') == text.count('content="light dark"') == 1


def test_a_check_that_passes_has_no_list_of_faults():
    text = Reader(page([made_check({})], "check", MADE)).text
    assert "What is wrong" not in text
    assert "40 rows: 40 PASS" in text


@pytest.fixture(scope="module")
def browser():
    with Chromium(find_or_skip()) as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "a%20b #?.html"
    path.write_text(the_page())
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser_nothing_is_wider_than_the_screen_and_nothing_is_complained_of(browser, file, width, scheme):
    browser.open(file, width, scheme)
    assert browser.run("[innerWidth, document.documentElement.clientWidth]") == [width, width]
    assert browser.run("document.documentElement.scrollWidth") <= width
    # what scrolls does so in its own box
    outside = "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg')"
    found = f"[...document.querySelectorAll('main *')].filter(e => {outside}).map(e => e.outerHTML.slice(0, 80))"
    assert browser.run(found) == []
    assert browser.complaints() == []
    assert browser.run("document.title") == f"Coordinate check of {SCRIPT}: FAIL"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_light_and_in_the_dark(browser, file, scheme):
    browser.open(file, 1200, scheme)
    colors = browser.run(
        """(() => {
          const of = (key, where) => [...document.querySelectorAll(where)].map(e => getComputedStyle(e)[key]);
          return {back: of("backgroundColor", "body")[0], scheme: of("colorScheme", "html")[0],
            text: [...of("color", "h1, h1 span, p, figcaption, summary, td, dt, dd"), ...of("fill", "svg text")],
            lines: of("stroke", "svg .line > path, svg .guide")}; })()"""
    )
    back = luminance(colors["back"])
    assert (back < 0.05) == (scheme == "dark")
    assert colors["scheme"] == "light dark"
    assert len(colors["text"]) > 300
    assert min(contrast(back, luminance(c)) for c in colors["text"]) >= 4.5
    assert min(contrast(back, luminance(c)) for c in colors["lines"]) >= 2


def luminance(color: str) -> float:
    parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_panels_stand_side_by_side_on_a_wide_screen_and_are_stacked_on_a_narrow_one(browser, file):
    lefts = "new Set([...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().left)).size"
    for width, columns in ((400, 1), (1200, 2)):
        browser.open(file, width, "light")
        assert browser.run(lefts) == columns
        assert browser.run("document.querySelectorAll('figure svg').length") == 8
        size = "document.querySelector('svg text').getBoundingClientRect().height"
        assert browser.run(size) >= 9, "text that can be read"


def test_rows_are_found_by_name_and_by_verdict(browser, file):
    browser.open(file, 400, "dark")
    shown = "[...document.querySelectorAll('tbody tr')].filter(e => e.offsetParent).map(e => e.cells[1].textContent)"
    scroll = "(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))"
    assert browser.run(scroll), "the table scrolls in its box"
    assert len(browser.run(shown)) == 48
    browser.run("document.getElementById('only-FAIL').click()")
    assert len(browser.run(shown)) == 32
    assert browser.run("document.getElementById('count').textContent") == "32 of 48 rows"
    browser.run("words.value = 'ATTN.q init'; words.dispatchEvent(new Event('input'))")
    assert sorted(browser.run(shown)) == ["blocks.0.attn.q.weight", "blocks.1.attn.q.weight"]
    browser.run("document.getElementById('only-PASS').click()")
    assert browser.run(shown) == []
    assert browser.complaints() == []


def test_without_javascript_everything_is_there_but_the_search_for_a_name(browser, file, tmp_path):
    plain = tmp_path / "plain.html"
    plain.write_text(re.sub(r"<script>.*?</script>", "", file.read_text(), flags=re.DOTALL))
    browser.open(plain, 400, "light")
    rows = "[...document.querySelectorAll('tbody tr')].filter(e => e.offsetParent).length"
    assert browser.run(rows) == 48
    browser.run("document.getElementById('only-FAIL').checked = true")
    assert browser.run(rows) == 32
    assert not browser.run("document.getElementById('search').offsetParent")
    assert browser.run("document.querySelectorAll('svg .line').length") > 40
