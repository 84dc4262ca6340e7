"""The page in Chromium: a picture is chosen, a question asked by keyboard, the answer streams; phone, light and dark.

Needs a chromium on the PATH (`apt-get install chromium`); without one the tests are skipped. Playwright comes with the extra [test].
VLM_JAX_SCREENSHOTS names a folder for the pictures of the page.
"""

import os
import shutil
from pathlib import Path

import pytest
from askable import QUESTION, picture, serving, write_run
from playwright import sync_api as playwright

import vlm_jax
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.limits import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH"),
]


@pytest.fixture(scope="module")
def model(world):
    return vlm_jax.load(write_run(world.parent / "m3", world, "m3", train_tokens=(1, 4)))


@pytest.fixture(scope="module")
def address(model):
    engine = Engine(model, Limits(rows=1, prompt_tokens=72, max_new_tokens=12))
    with serving(engine) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, address, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_function("document.getElementById('name').textContent === 'tiny'")
    return page


def photograph(page, name):
    folder = os.environ.get("VLM_JAX_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def asked(page, world):
    """Chooses a picture and asks by keyboard alone; the answer."""
    page.set_input_files("#file", str(picture(world, "orange")))
    page.wait_for_selector("#picture:visible")
    page.wait_for_function("document.activeElement.id === 'question'")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#costs:visible")
    return page.inner_text("#answer")


def test_a_picture_is_asked_about_by_keyboard(browser, address, model, world):
    page = opened(browser, address, viewport={"width": 1200, "height": 900})
    assert asked(page, world) == model.ask(picture(world, "orange"), QUESTION, max_new_tokens=12)
    assert page.locator(".bar").count() == 2  # V = 4 is all of this encoder's patches
    page.focus("#tokens")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#count") == "1"
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('.bar').length === 4")
    expected = model.ask(picture(world, "orange"), QUESTION, max_new_tokens=12, visual_tokens=1)
    assert page.inner_text("#answer") == expected
    page.click("#draw")
    page.wait_for_selector("#map:visible")
    page.wait_for_function("document.getElementById('map').naturalWidth > 300")
    assert page.is_hidden("#error")
    photograph(page, "desktop")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_light_and_dark(browser, address, world, scheme):
    page = opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    asked(page, world)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
    photograph(page, f"phone_{scheme}")


def test_an_error_of_the_server_is_shown(browser, address, world):
    page = opened(browser, address)
    page.fill("#question", "Say </s>")
    page.click("#ask")
    page.wait_for_selector("#error:visible")
    assert "control token" in page.inner_text("#error")
    page.fill("#question", "Say hello")
    page.click("#ask")
    page.wait_for_function("document.getElementById('answer').textContent.length > 0")
    assert page.is_hidden("#error")
