"""The page in a real browser, headless Chromium: what is drawn, switched, printed and loaded."""

import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from run_folders import run_folder
from runs import ROOT, SUPPORT, environment

from unic_ds.evaluate.comparison import Comparison, Score
from unic_ds.report import page

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("playwright") is None or not CHROMIUM.exists(),
        reason="playwright and Debian's chromium are not installed",
    ),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "</script><img src=x onerror=document.title='owned'>"

INKED = """figure => {
  const canvas = figure.querySelector('canvas');
  const context = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
  context.drawImage(canvas, 0, 0);
  const pixels = new Uint32Array(
    context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size;
}"""
"""Distinct colours of a chart's canvas."""

STEPS = "() => document.querySelector('.range').textContent"
WIDTHS = "() => [document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two runs, of which one has a hostile teacher."""
    made = tmp_path_factory.mktemp("pages")
    scores = [Score("dino", "knn", 70.0, "knn k=20"), Score("student after", "knn", 60.0, "knn")]
    table = Comparison.of(scores, {"dino": "teacher", "student after": "student"})
    events = [{"event": "failed", "step": 3, "error": HOSTILE}] * 20
    one = run_folder(made / "one", lines=3000, events=events, table=table)
    two = run_folder(made / "two", lines=90, teachers=("dino", HOSTILE), optim__lr=0.5)
    return page.write_for([one, two], made / "two.html")


@pytest.fixture
def opened(browser, report):
    """Open a page in a context of its own; what it says and loads is checked at the end."""
    said, loaded, contexts = [], [], []

    def open_page(file=report, **settings):
        context = browser.new_context(offline=True, **({"viewport": DESKTOP} | settings))
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: loaded.append(request.url))
        shown.goto(file.as_uri())
        shown.wait_for_function("document.documentElement.dataset.drawn")
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    pages = [url for url in loaded if not url.startswith("data:")]
    assert len(pages) == len(contexts) and all(url.startswith("file:") for url in pages)


def test_every_curve_is_drawn_and_nothing_else_runs(opened, tmp_path):
    shown = opened()
    figures = shown.locator("figure.chart").element_handles()
    assert len(figures) > 15
    assert all(figure.evaluate(INKED) > 5 for figure in figures)
    assert "owned" not in shown.title()
    assert shown.screenshot(path=tmp_path / "report.png", full_page=True)
    empty = "document.querySelectorAll('script').length"
    assert shown.evaluate(empty) == 2 and shown.locator("img").count() == 0


def test_switches_work_by_keyboard(opened):
    shown = opened()
    first = shown.locator("figure.chart").first
    before = first.evaluate(INKED)
    for switch in (first.locator("button").first, shown.locator("[data-run='1']")):
        switch.focus()
        assert switch.get_attribute("aria-pressed") == "true"
        shown.keyboard.press("Enter")
        assert switch.get_attribute("aria-pressed") == "false"
    assert first.locator("button").nth(1).get_attribute("aria-pressed") == "false"
    assert first.evaluate(INKED) < before  # both curves are off
    shown.keyboard.press("Space")
    assert first.locator("button").nth(1).get_attribute("aria-pressed") == "true"
    order = []
    shown.locator("[data-view='in']").focus()
    for _ in range(6):
        shown.keyboard.press("Tab")
        order.append(shown.evaluate("document.activeElement.dataset.view"))
    assert order == ["out", "left", "right", "all", "log", "smooth"]


def test_curves_are_zoomed_by_buttons_and_by_dragging(opened):
    shown = opened()
    shown.locator("[data-view='in']").press("Enter")
    assert shown.evaluate(STEPS) == "steps 7,508 to 22,502"
    shown.locator("[data-view='left']").press("Enter")
    assert shown.evaluate(STEPS) == "steps 10 to 15,005"
    shown.locator("[data-view='all']").press("Enter")
    assert shown.evaluate(STEPS) == "all steps"
    over = shown.locator("figure.chart .u-over").first
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    y = box["y"] + box["height"] / 2
    shown.mouse.move(box["x"] + box["width"] * 0.25, y)
    shown.mouse.down()
    shown.mouse.move(box["x"] + box["width"] * 0.5, y, steps=4)
    value = shown.locator("figure.chart output").first
    assert value.text_content()
    shown.mouse.up()
    first, last = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", shown.evaluate(STEPS)))
    assert 7_000 < first < 8_000 and 14_500 < last < 15_500
    over.dblclick()
    assert shown.evaluate(STEPS) == "all steps"
    chart = shown.locator("figure.chart").first
    pictures = [chart.locator("canvas").screenshot()]
    for view in ("log", "smooth"):
        switch = shown.locator(f"[data-view='{view}']")
        switch.press("Enter")
        assert switch.get_attribute("aria-pressed") == "true"
        pictures.append(chart.locator("canvas").screenshot())
    assert len(set(pictures)) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_and_in_the_dark(opened, scheme):
    shown = opened(viewport=PHONE, is_mobile=True, has_touch=True, color_scheme=scheme)
    assert shown.evaluate(WIDTHS) == [390, 390]
    shown.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    assert shown.evaluate(WIDTHS) == [390, 390]
    page_colour, ink = (
        sum(map(int, re.findall(r"\d+", shown.evaluate(f"getComputedStyle(document.body).{of}"))))
        for of in ("backgroundColor", "color")
    )
    assert (page_colour > 600 > 200 > ink) if scheme == "light" else (ink > 600 > 200 > page_colour)
    stroke = "getComputedStyle(document.documentElement).getPropertyValue('--c0').trim()"
    assert shown.evaluate(stroke) == {"light": "#0072b2", "dark": "#5db8f0"}[scheme]


def test_it_prints_on_white_with_all_details_and_no_buttons(opened):
    shown = opened(color_scheme="dark")
    assert len(shown.pdf(format="A4")) > 50_000
    shown.emulate_media(media="print")
    shown.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not shown.locator(".tools").is_visible() and not shown.locator("nav").is_visible()
    assert shown.locator("details:not([open])").count() == 0
    assert shown.get_by_text("All settings", exact=True).is_visible()
    assert shown.locator("figure.chart").first.evaluate(INKED) > 5
    shown.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert shown.locator("details:not([open])").count() > 15


def test_a_screen_reader_finds_its_way(opened):
    shown = opened()
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the report"
    assert [shown.locator(tag).count() for tag in ("main", "h1", "nav", "footer")] == [1, 1, 1, 1]
    levels = shown.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert all(b - a <= 1 for a, b in pairwise(levels))
    nameless = "all => all.filter(one => !(one.ariaLabel || one.textContent.trim())).length"
    assert shown.locator("button, a, [role=img], [role=region]").evaluate_all(nameless) == 0
    chart = shown.get_by_role(
        "img", name=re.compile(r"Distillation loss over.*one [-.0-9]+ at step 30000")
    )
    assert chart.count() == 1
    shown.locator("figure.chart summary").first.press("Enter")
    assert shown.get_by_role("columnheader", name="Largest").count() == 1


def test_without_scripts_the_figures_are_there(browser, report):
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(report.as_uri())
    assert shown.locator("noscript").is_visible()
    assert not shown.locator(".tools").is_visible()
    shown.locator("figure.chart summary").first.click()
    assert shown.get_by_role("cell", name="77", exact=True).first.is_visible()
    context.close()


@pytest.mark.dist
def test_the_page_of_a_real_run(opened, finished):
    shown = opened(finished[0] / page.FILE)
    figures = shown.locator("figure.chart").element_handles()
    assert len(figures) >= 10 and all(figure.evaluate(INKED) > 5 for figure in figures)
    assert shown.evaluate(WIDTHS) == [1280, 1280]


@pytest.mark.dist
def test_the_command_of_the_docs_draws_its_pictures(finished, tmp_path):
    command = [sys.executable, str(SUPPORT / "docs_pictures.py"), str(finished[0]), str(tmp_path)]
    subprocess.run(command, env=environment(), cwd=ROOT, check=True, timeout=300)
    for name in ("report", "tensorboard", "watch"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50, name
