"""The page in headless Chromium: it works, reads well in both themes and at every width, and asks for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_records as records

from rlhf_doctor.report import html

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Every visible piece of text with its ratio of contrast to what is behind it. Backgrounds here are opaque or absent;
# behind a text in a drawing is the rectangle of its own group, or what the drawing lies on.
CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    if (element.tagName === "text") {
      const box = element.parentElement.querySelector(":scope > rect");
      if (box && getComputedStyle(box).fill !== "none") return numbers(getComputedStyle(box).fill);
    }
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
    if (!element.checkVisibility() || element.closest(".hidden-label, .skip")) continue;
    const style = getComputedStyle(element);
    const a = light(numbers(element instanceof SVGElement ? style.fill : style.color)), b = light(behind(element));
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, large ? 3 : 4.5, walk.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


class Opened:
    """A page of a record, with everything that it said and asked for."""

    def __init__(
        self, browser: Any, folder: Path, made: dict[str, Any], width: int = 1280, theme: str = "light"
    ) -> None:
        file = folder / "report.html"
        file.write_text(html.render(made), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.context = context
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.address = file.as_uri()

    def shown(self) -> list[str]:
        """Ids of the findings in sight or foldable into it, without those kept as context alone."""
        found: list[str] = self.page.eval_on_selector_all(
            ".finding", "all => all.filter(f => !f.closest('[hidden]') && !f.matches('.context')).map(f => f.id)"
        )
        return found

    def wait_for(self, selector: str, text: str) -> None:
        """Until the element says this. The page's own policy forbids to evaluate strings, which is as it should be."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(text)

    def count(self) -> str:
        return str(self.page.inner_text("#count"))


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    one = Opened(browser, tmp_path, records.founding())
    yield one
    one.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 768, 1280, 1600])
@pytest.mark.parametrize("case", ["founding", "critic_free", "unreadable", "traced", "watched"])
def test_page_is_quiet_fits_and_reads(browser: Any, tmp_path: Path, case: str, width: int, theme: str) -> None:
    one = Opened(browser, tmp_path, records.EVERY[case](), width, theme)
    one.page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
    assert one.said == []
    assert [a for a in one.asked if a != one.address and not a.startswith("data:")] == []
    wide = one.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"{wide} px wide in a window of {width}"
    measured = one.page.evaluate(CONTRAST)
    assert len(measured) > 30
    assert [m for m in measured if m[0] < m[1]] == []
    one.context.close()


def test_long_names_do_not_push_the_page_wide(browser: Any, tmp_path: Path) -> None:
    made = records.founding()
    for card in made["setup"]["roles"].values():
        card["class_name"] = card["path"] = card["why"] = "x" * 300
    for found in made["findings"]:
        found["message"] = "y" * 400
        found["evidence"][0] |= {"observed": "z" * 300, "where": "/w" * 200, "reproduce": "r" * 300}
    made["setup"]["origin"] = "o" * 300
    made["errors"] = [{"role": "value", "message": "e" * 300}]
    made["skipped"][0]["reason"] = "s" * 300
    for width in (400, 1600):
        one = Opened(browser, tmp_path, made, width)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width
        one.context.close()


def test_filter_by_text_role_and_severity(opened: Opened) -> None:
    everything = ["REW001-reward", "REW006-reward", "VAL001-value", "SYS010-policy", "REW010-reward"]
    assert opened.shown() == everything
    assert opened.count() == "5 of 5 findings shown"
    page = opened.page
    page.fill("#words", "GRU")
    assert opened.shown() == ["VAL001-value"]
    assert opened.count() == "1 of 5 findings shown"
    assert page.get_attribute("#count", "aria-live") == "polite"
    page.click("text=Show all")
    opened.wait_for("#count", "5 of 5 findings shown")
    page.select_option("#role", "reward")
    assert opened.shown() == ["REW001-reward", "REW006-reward", "REW010-reward"]
    page.uncheck("input[value=error]")
    assert opened.shown() == ["REW006-reward", "REW010-reward"]
    assert page.is_visible("#REW006-reward"), "what matches is unfolded"
    assert page.is_visible("#REW001-reward-h"), "its cause stays as context"
    page.fill("#words", "no such words")
    assert opened.shown() == []
    assert opened.count() == "0 of 5 findings shown"
    assert not page.is_visible("#findings")


def test_filter_works_by_keyboard_alone(opened: Opened) -> None:
    page = opened.page
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "words":
            break
    page.keyboard.type("pickle")
    assert opened.shown() == ["SYS010-policy"]
    page.keyboard.press("Tab")
    page.keyboard.press("c")  # critic
    assert opened.shown() == []
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.is_checked("input[value=error]") is False
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Show all"
    page.keyboard.press("Enter")
    opened.wait_for("#count", "5 of 5 findings shown")


def test_focus_is_seen_on_everything_that_takes_it(opened: Opened) -> None:
    page = opened.page
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.outerHTML.slice(0, 60), getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name.startswith("<body"):
            break
        seen.add(name)
        assert outline != "none", name
    assert len(seen) > 15


def test_a_link_unfolds_what_it_points_to(opened: Opened) -> None:
    page = opened.page
    assert not page.is_visible("#REW006-reward")
    page.click("article.card a[href='#REW006-reward']")
    page.wait_for_selector("#REW006-reward", state="visible")
    assert page.evaluate("document.activeElement.id") == "REW006-reward"
    page.fill("#words", "GRU")
    page.click("article.card a[href='#SYS010-policy']")
    page.wait_for_selector("#SYS010-policy", state="visible")


def test_copying_gives_the_line_itself(opened: Opened) -> None:
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = opened.page
    page.click("#first [data-copy]")
    opened.wait_for("#said", "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "rlhf-doctor check setup.py:build --select REW001"
    page.click("[data-copies]")
    opened.wait_for("[data-copies]", "Copied")
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == records.founding()


def test_the_theme_button_wins_over_the_system(browser: Any, tmp_path: Path) -> None:
    one = Opened(browser, tmp_path, records.founding(), theme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = one.page.evaluate(ground)
    one.page.click("#theme")
    light = one.page.evaluate(ground)
    assert light != dark
    assert one.page.inner_text("#theme") == "Dark theme"
    assert [m for m in one.page.evaluate(CONTRAST) if m[0] < m[1]] == []
    one.page.reload()
    assert one.page.evaluate(ground) == light, "the choice is kept"
    one.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_print_shows_everything_on_white(browser: Any, tmp_path: Path, theme: str) -> None:
    one = Opened(browser, tmp_path, records.founding(), theme=theme)
    one.page.fill("#words", "GRU")  # what is filtered away is printed all the same
    one.page.emulate_media(media="print")
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for target in ("#REW006-reward .message", "#VAL001-value .rule", "#REW001-reward .evidence"):
        box = one.page.locator(target).first.bounding_box()
        assert box, f"{target} is not printed"
        assert box["height"] > 0
    assert not one.page.is_visible(".contents")
    assert not one.page.is_visible("#filter")
    one.page.emulate_media(media="screen")
    assert one.page.locator("details[open]").count() == 0
    one.context.close()


def test_without_scripts_everything_is_there_and_nothing_dead_is(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html.render(records.founding()), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("button:visible").count() == 0
    assert page.locator("#filter:visible").count() == 0
    assert page.locator("#findings .finding:visible").count() == 3
    context.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_tokens_scroll_in_their_own_box_beside_their_names(browser: Any, tmp_path: Path, width: int) -> None:
    made = records.traced()
    sample = made["trace"]["sample"]
    sample["tokens"] *= 8
    for row in sample["rows"]:
        for key in ("measured", "declared", "differs"):
            row[key] = row[key] and row[key] * 8
    one = Opened(browser, tmp_path, made, width)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    names = one.page.locator(".tokens tbody th").first
    before = names.bounding_box()
    one.page.eval_on_selector("[aria-labelledby=tokens-h]", "box => { box.scrollLeft = 500; }")
    assert one.page.eval_on_selector("[aria-labelledby=tokens-h]", "box => box.scrollLeft") == 500
    after = names.bounding_box()
    assert before
    assert after
    assert after["x"] == pytest.approx(before["x"], abs=1), "what a row is stays in sight"
    one.context.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_in_the_graph_lies_on_anything_else(browser: Any, tmp_path: Path, width: int) -> None:
    one = Opened(browser, tmp_path, records.traced(), width)
    boxes = one.page.eval_on_selector_all(
        ".ways rect, .ways text.way",
        "all => all.map(e => { const b = e.getBoundingClientRect();"
        " return [e.textContent || e.nextElementSibling.textContent, b.left, b.top, b.right, b.bottom]; })",
    )
    assert len(boxes) == 14
    frame = one.page.eval_on_selector(
        ".ways svg", "e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }"
    )
    for n, (name, left, top, right, bottom) in enumerate(boxes):
        assert left >= frame[0], name
        assert right <= frame[2], name
        for other, x0, y0, x1, y1 in boxes[n + 1 :]:
            apart = right <= x0 or x1 <= left or bottom - 3 <= y0 or y1 - 3 <= top  # lines of text may touch
            assert apart, f"{name} lies on {other}"
    one.context.close()


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    made = records.founding()
    attack = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    made["setup"]["origin"] = attack
    for found in made["findings"]:
        found["message"] = found["evidence"][0]["observed"] = attack
    one = Opened(browser, tmp_path, made)
    assert one.page.evaluate("window.broken") is None
    assert one.said == []
    assert one.page.evaluate("JSON.parse(document.getElementById('record').textContent).setup.origin") == attack
    one.context.close()
