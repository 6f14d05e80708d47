"""The page in a real browser; skipped where there is no Chromium."""

import re

import pytest

from quantlab.report.html import write_report

pytestmark = pytest.mark.slow

SORT = """
const table = document.querySelector("table");
const texts = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText);
const head = [...table.tHead.rows[0].cells].find(cell => cell.innerText.startsWith("KL"));
const orders = [];
for (let click = 0; click < 2; click++) {
  head.querySelector("button").click();
  orders.push(texts().join("|"), head.ariaSort);
}
document.body.dataset.result = orders.join(";").replaceAll("\\n", " ");
"""
MEASURE = """
const boxes = [...document.querySelectorAll("section, figure svg")].filter(part => !part.closest("details"));
document.body.dataset.result = [innerWidth, document.documentElement.scrollWidth,
  boxes.length, boxes.filter(part => part.getBoundingClientRect().height > 20).length].join(";");
"""


def result(dom):
    return re.search(r'<body data-result="([^"]*)"', dom)[1]


def test_page_opens_without_complaints_and_every_section_is_visible(run_folder, tmp_path, chromium):
    dom, console = chromium(write_report([run_folder], tmp_path / "page.html"), MEASURE)
    assert console == []
    _, _, parts, visible = result(dom).split(";")
    assert int(parts) == int(visible) == 14


@pytest.mark.parametrize("width", [500, 820, 1440])
def test_page_is_never_wider_than_the_screen(comparison, tmp_path, chromium, width):
    dom, _ = chromium(write_report([comparison], tmp_path / "page.html"), MEASURE, width)
    screen, page, *_ = map(int, result(dom).split(";"))
    assert page <= screen == width


def test_long_names_wrap(hostile_run, tmp_path, chromium):
    dom, _ = chromium(write_report([hostile_run], tmp_path / "page.html"), MEASURE, 500)
    screen, page, *_ = map(int, result(dom).split(";"))
    assert page <= screen


def test_tables_sort_both_ways_with_what_is_missing_last(comparison, tmp_path, chromium):
    dom, console = chromium(write_report([comparison], tmp_path / "page.html"), SORT)
    assert console == []
    up, first, down, second = result(dom).split(";")
    assert (first, second) == ("ascending", "descending")
    assert up == "ganq 4-bit|gptq 4-bit|rtn 4-bit|float demo"
    assert down == "rtn 4-bit|gptq 4-bit|ganq 4-bit|float demo"


def test_scripts_from_outside_do_not_run(hostile_run, tmp_path, chromium):
    dom, console = chromium(write_report([hostile_run], tmp_path / "page.html"))
    assert console == []
    assert "<title>broken</title>" not in dom


def test_link_into_a_folded_run_opens_it(comparison, tmp_path, chromium):
    path = write_report([comparison], tmp_path / "page.html")
    open_parts = """
    location.hash = "#run-1-layers";
    addEventListener("hashchange", () => {
      document.body.dataset.result = [...document.querySelectorAll("#runs > details")].map(part => part.open).join(";");
    });
    """
    dom, _ = chromium(path, open_parts)
    assert result(dom) == "true;true;false"  # the best is open from the start
