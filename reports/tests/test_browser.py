"""The page in Chromium: no complaint, no request, a search that finds, both widths, both themes.

Playwright's client drives the Chromium of the Debian package, which `make test` installs where it
may (as root, with apt-get). Skipped where there is none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from reports.groups import over_seeds
from reports.reading import Collection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)

SMALL_OR_CUT = """
() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.height && (own.height < 9 || own.right > box.right + 12 || own.left < box.left - 12);
  }).map((text) => text.textContent);
})
"""
OVERLAPS = """
() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim())
    .map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1)
    .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 4
                    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 5)
    .map(([other]) => `${one} | ${other}`));
})
"""
CONTRASTS = """
() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((p) => p / 255)
      .map((p) => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const inside = element.closest("svg"), style = getComputedStyle(element);
    const pair = [light(inside ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${walker.currentNode.data.slice(0, 40)}`);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start as root; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(page: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(page, encoding="utf-8")
    return file.as_uri()


def _look(tab: Page, text: str) -> list[list[str]]:
    tab.fill("#query", text)
    return [
        row.locator("th, td").all_text_contents() for row in tab.locator("#tokens tbody tr").all()
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_looks_right(
    browser: Browser, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    with browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    ) as context:
        tab = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(address)
        tab.wait_for_selector("#tokens tbody tr")
        assert complaints == []
        assert [url for url in requests if url != address] == []
        assert tab.title().startswith("Which tokens paid?")
        root = "document.documentElement"
        assert tab.evaluate(f"{root}.scrollWidth - {root}.clientWidth") <= 0
        assert tab.is_visible("figure .wide") == (width > 600)
        assert tab.is_visible("figure .narrow") == (width < 600)
        assert tab.evaluate(SMALL_OR_CUT) == []
        assert tab.evaluate(OVERLAPS) == []
        assert tab.evaluate(CONTRASTS) == []
        shot = tab.screenshot(path=tmp_path / "page.png")
        assert shot.startswith(b"\x89PNG")
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_search_finds_tokens_and_runs_none(
    browser: Browser, address: str, collection: Collection
) -> None:
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(address)
        tab.wait_for_selector("#tokens tbody tr")
        for place, group in enumerate(collection.groups):
            tab.select_option("#group", index=place)
            row = _look(tab, "token7")[0]
            at = group["label"].values.tolist().index("token7")
            seen = 100 * group["windows_seen"].values[:, at].mean()
            count = f"{group['class_count'].values[at]} in {seen:.0f} %"
            assert row[:2] == ["token7", count]
            shown = [cell.split(" S ") for cell in row[2:5]]
            loss = over_seeds(group, "loss")["mean"].values[:, at]
            speed = over_seeds(group, "learning_speed")["mean"].values[:, at]
            assert [float(cell) for cell, _ in shown] == pytest.approx(loss, abs=1e-3)
            assert [float(cell) for _, cell in shown] == pytest.approx(speed, abs=1e-2)
        assert [row[0] for row in _look(tab, "<IMG SRC")] == [
            "<img␣src=x␣onerror=document.title='owned'>"
        ]
        assert tab.evaluate("document.images.length") == 0
        assert tab.title().startswith("Which tokens paid?")
        assert {row[0] for row in _look(tab, " the")[:2]} == {"␣the", "Ġthe"}
        for unseen in ("\u202e", "\0", "\xa0", "\U000e0041"):
            found = [row[0] for row in _look(tab, f"un{unseen}seen")]
            escaped = unseen.encode("unicode_escape").decode("ascii")
            assert found == [f"un{escaped}seen"]
        assert _look(tab, "no such token") == []
        assert tab.inner_text("#found") == "Nothing holds this text."


def test_everything_is_reached_by_keyboard(browser: Browser, address: str) -> None:
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(address)
        tab.wait_for_selector("#tokens tbody tr")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        assert tab.locator(".skip").bounding_box()["x"] >= 0
        reached = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            reached.add(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"A", "query", "group", "SUMMARY", "DIV"} <= reached
        tab.focus("#query")
        tab.keyboard.type("token7")
        assert tab.locator("#tokens tbody tr").first.inner_text().startswith("token7")
