"""The page in a real browser (Debian's chromium): nothing from the network, no errors, keyboard, no sideways scrolling.

``apt-get install chromium`` is part of the test set-up. Without it these tests are skipped; under CI they fail.
"""

import io
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from dqtk.report.film import png_of, sheet_of
from dqtk.report.page import write_page
from dqtk.report.player import Player

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("chromium is not installed (apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'dqtk[dev]'")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM or "/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, made_up, tmp_path):
    """A function (width, colour scheme, JavaScript) -> page, opened; what went wrong is asserted at the end."""
    path = write_page(made_up(), tmp_path / "report.html", command="dqtk compare " + "a-very-long-folder-name/" * 8)
    contexts, complaints = [], []

    def open_page(width=1000, scheme="light", script=True, offline=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script, offline=offline
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_never_scrolls_sideways(visit, width, scheme):
    page = visit(width, scheme)
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".pair").count() == 4


def test_divider_moves_by_keyboard_and_by_pointer(visit):
    page = visit()
    pair = page.locator(".pair").first
    slider = pair.get_by_role("slider")
    assert "pair 1" in slider.get_attribute("aria-label")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "60"
    assert slider.get_attribute("aria-valuetext").startswith("60 % original")
    clip = pair.locator("img.candidate").evaluate("e => getComputedStyle(e).clipPath")
    assert "60%" in clip
    page.keyboard.press("Home")
    assert slider.input_value() == "0"
    pair.locator(".stage").scroll_into_view_if_needed()
    box = pair.locator(".stage").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert slider.input_value() == "75"


def test_difference_view_shows_four_times_the_difference(visit):
    """The made-up pair is (200, 40, 40) against (190, 50, 40): the view must show (40, 40, 0)."""
    page = visit()
    pair = page.locator(".pair").first
    button = pair.get_by_role("button", name="Difference")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert pair.locator(".tag.amplified").is_visible()
    assert not pair.locator(".divider").is_visible()
    shot = Image.open(io.BytesIO(pair.locator(".stage").screenshot())).convert("RGB")
    pixel = shot.getpixel((shot.width // 2, shot.height // 2))
    assert all(abs(a - b) <= 2 for a, b in zip(pixel, (40, 40, 0), strict=True))
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    page.locator("#all-differences").click()
    assert page.locator(".pair.difference").count() == 4


def test_every_control_is_reached_by_tab_and_seen_in_focus(visit):
    page = visit()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.skip", "INPUT.", "BUTTON.", "SUMMARY."} <= reached
    assert any(name.startswith("DIV.scroll") for name in reached)
    slider = page.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


def test_light_and_dark_are_readable(visit):
    """WCAG contrast of body text and of the muted text on their ground, both schemes: at least 4.5."""
    script = """() => {
        const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return [".verdict", ".kicker", "summary"].map(s => { const a = light(getComputedStyle(document.querySelector(s)).color);
            return (Math.max(a, ground) + .05) / (Math.min(a, ground) + .05); });
    }"""
    grounds = set()
    for scheme in ("light", "dark"):
        page = visit(scheme=scheme)
        assert min(page.evaluate(script)) >= 4.5, scheme
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_without_scripts_both_halves_and_all_tables_are_there(visit):
    page = visit(script=False)
    assert page.locator(".pair img.candidate").count() == 4
    assert page.get_by_role("table").count() >= 4
    assert page.get_by_role("heading", level=1).inner_text() == "out/pixart-w4a8 against tiny-pixart"


@pytest.fixture
def clips(made_up, tmp_path, browser):
    """A page with two pairs of clips of four frames of 6 x 4 pixels, opened: grey 100 + 10 f against 105 + 10 f."""
    complaints, contexts = [], []

    def sheet(level):
        return png_of(sheet_of([Image.new("RGB", (6, 4), (level + 10 * f,) * 3) for f in range(4)]))

    scores = {"psnr": (34.0, 33.0, 32.0, 31.0)}
    images = {"reference": sheet(100), "candidate": sheet(105)}
    rows = tuple(replace(row, images=images, num_frames=4, frame_scores=scores, frame_floor={}) for row in made_up().rows[:2])
    path = write_page(made_up(rows=rows), tmp_path / "clips.html")

    def open_page(width=1000, script=True):
        context = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=script, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))  # reading back is warned of
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


LEVELS = "e => [...e.querySelectorAll('canvas')].map(c => c.getContext('2d').getImageData(3, 2, 1, 1).data[0])"


def test_clips_are_scrubbed_together(clips):
    page = clips()
    player = page.locator(".player.ready").first
    assert player.evaluate(LEVELS) == [100, 105, 5]
    scrubber = player.get_by_role("slider")
    scrubber.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert player.evaluate(LEVELS) == [120, 125, 5]
    assert scrubber.get_attribute("aria-valuetext") == "frame 3 of 4, PSNR 32.0 dB"
    shot = Image.open(io.BytesIO(player.locator("canvas.apart").screenshot())).convert("RGB")
    assert abs(shot.getpixel((shot.width // 2, shot.height // 2))[0] - 20) <= 2  # four times the difference
    assert page.locator(".player.ready").nth(1).evaluate(LEVELS)[0] == 100


def test_all_clips_play_in_step_and_stop(clips):
    page = clips()
    page.locator(".player.ready").nth(1).wait_for()
    everyone = page.get_by_role("button", name="Play all")
    everyone.click()
    seen = page.locator(".player input").first
    for _ in range(100):  # the page's policy forbids wait_for_function
        if seen.input_value() == "2":
            break
        page.wait_for_timeout(30)
    assert seen.input_value() == "2"
    values = "[...document.querySelectorAll('.player input')].map(e => e.value)"
    assert len(set(page.evaluate(values))) == 1
    assert page.get_by_role("button", name="Play: pair 1").inner_text() == "Pause"
    page.get_by_role("button", name="Pause all").click()
    still = page.evaluate(values)
    page.wait_for_timeout(300)
    assert page.evaluate(values) == still


@pytest.mark.parametrize("width", [360, 1600])
def test_clips_fit_and_without_scripts_their_frames_are_there(clips, width):
    page = clips(width)
    page.locator(".player.ready").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plain = clips(width, script=False)
    assert plain.locator(".player img").count() == 4
    assert plain.locator(".player img").first.is_visible()
    assert not plain.locator(".play-all").is_visible()


def test_the_player_of_a_notebook_runs_by_itself(browser, tmp_path):
    before, after = ([Image.new("RGB", (6, 4), (level + f,) * 3) for f in range(3)] for level in (10, 40))
    (tmp_path / "cell.html").write_text(f"<!doctype html>{Player(before, after)._repr_html_()}", encoding="utf-8")
    context = browser.new_context(offline=True)
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "cell.html").as_uri())
    player = page.locator(".player.ready")
    player.wait_for()
    player.get_by_role("slider").press("ArrowRight")
    assert player.evaluate(LEVELS) == [11, 41, 30]
    assert "PSNR" in player.locator("output").inner_text()
    context.close()
    assert complaints == []
