"""How reports read: as text, as a page, in a notebook, as a picture."""

import html
import io
import math

import pytest

from crystal.mup.report import report_text, rows_text
from crystal.mup.verdict import Report, Row
from tests.mup.drawn_checks import made_check
from tests.mup.faults import audited
from tests.mup.test_coord_page import Reader

SCRIPT = "<script>alert(1)</script>"


def row(name, verdict="PASS", slope=0.0, message="", quantity="lr"):
    ci = None if slope is None else (slope, slope)
    return Row(name, quantity, slope, ci, 0.0, verdict, "Table 8", message and f"{name}: {message}")


@pytest.fixture
def mixed():
    rows = [row("fine"), row("a", "FAIL", 1.0, "it grows"), row("b", "FAIL", 1.0, "it grows")]
    rows += [row("seen", "INCONCLUSIVE", None, "not read"), row("open", "INCONCLUSIVE", None, "not seen either")]
    return Report(rows, 1.25, ["a remark"], accept=("see*", "nobody"))


def test_the_text_says_verdict_faults_reasons_and_notes_in_this_order(mixed):
    assert str(mixed).splitlines() == [
        "FAIL  5 checks, 1.2 s",
        "  a: it grows, and so 1 more",
        "  inconclusive: open: not seen either",
        "  note: a remark",
        "  note: accepted as INCONCLUSIVE: seen",
        "  note: accept nobody: nothing of that name is INCONCLUSIVE",
    ]
    assert report_text(mixed, "mine: mup").startswith("FAIL  mine: mup\n")


def test_what_faults_do_is_not_listed_beside_them():
    rows = [row("w", "FAIL", 1.0, "its LR"), row("act", "INCONCLUSIVE", 0.3, "more seeds", "size t=4")]
    assert "act" not in str(Report(rows, 0.0))
    assert "  inconclusive: act: more seeds" in str(Report(rows[1:], 0.0))


def test_a_coordinate_check_says_how_it_was_measured():
    assert str(made_check({}, "amber, mup")).startswith("PASS  amber, mup: widths ")
    assert str(made_check({}, "")).startswith("PASS  widths ")


def test_rows_stand_worst_first_and_are_cut(mixed):
    lines = rows_text(mixed.rows, 3).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["FAIL", "a"], ["FAIL", "b"], ["INCONCLUSIVE", "seen"]]
    assert lines[4] == "2 more rows"


def test_the_page_of_an_audit_has_every_row_and_escapes_names(mixed):
    mixed.rows.append(row(SCRIPT, "FAIL", 2.0, "it grows"))
    page = mixed.to_html()
    reader = Reader(page)
    assert [line[0] for line in reader.rows[1:]] == ["FAIL"] * 3 + ["INCONCLUSIVE"] * 2 + ["PASS"]
    assert SCRIPT not in page
    assert SCRIPT in reader.text
    assert reader.addresses == []
    for words in ("muP audit: FAIL", "What is wrong", "a remark", "accepted as INCONCLUSIVE: seen", "Learning rate of"):
        assert words in reader.text


def test_a_coordinate_checks_page_has_its_pictures():
    page = made_check({}, "").to_html()
    assert page.startswith("<!doctype html>")
    assert "Against width" in page
    assert "model: widths" in page
    assert "<svg" in page


@pytest.mark.parametrize("report", [Report([], 0.0), made_check({}, "amber, mup")], ids=["audit", "coord-check"])
def test_a_notebook_shows_the_page_in_a_frame(report):
    cell = report._repr_html_()
    assert cell.startswith('<iframe sandbox="allow-scripts"')
    assert html.escape(report.to_html()) in cell


def test_an_audit_is_drawn_by_quantity_and_what_fails_is_named():
    figure = audited("swapped roles").plot()
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles[:2] == ["init: 2 of 29 fail", "lr: 2 of 29 fail"]
    assert {"blocks.0.o.weight", "head.weight"} <= {t.get_text() for t in figure.axes[0].texts}
    figure.savefig(io.BytesIO(), format="png")


def test_what_fails_without_a_place_in_the_picture_is_named_above_it():
    figure = Report([row("w"), row("endless", "FAIL", math.inf, "never"), row("none", "FAIL", None, "x")], 0.0).plot()
    assert figure.axes[0].get_title() == "lr: 2 of 3 fail\nnot drawn: endless +1"


def test_what_has_no_exponent_is_drawn_too(mixed):
    for report in (Report([], 0.0), mixed, Report(mixed.rows[3:], 0.0), made_check({}, "$a_b$")):
        report.plot().savefig(io.BytesIO(), format="png")
