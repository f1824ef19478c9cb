"""The page in Chromium: it runs without complaint or network, and its search finds tokens.

Skipped where there is no Chromium (Debian: apt-get install chromium). The page is driven by a
script of our own in a copy of it, whose findings the browser prints with the document.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reports.groups import Collection, over_seeds

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PROBE = """
(async () => {
  const seen = { errors: [], requests: [] };
  addEventListener("error", (event) => seen.errors.push(String(event.message)));
  addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
  addEventListener("securitypolicyviolation", (event) => seen.errors.push(event.violatedDirective));
  const complain = console.error;
  console.error = (...words) => { seen.errors.push(words.join(" ")); complain(...words); };
  await new Promise((done) => addEventListener("load", done));
  const query = document.getElementById("query"), body = document.querySelector("#tokens tbody");
  while (!body.rows.length) await new Promise((done) => setTimeout(done, 20));
  const look = (text) => {
    query.value = text;
    query.dispatchEvent(new Event("input"));
    return [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
  };
  seen.token7 = look("token7");
  seen.image = look("<IMG SRC");
  seen.the = look(" the");
  seen.nothing = look("no such token");
  seen.status = document.getElementById("found").textContent;
  look("");
  const choice = document.getElementById("group");
  choice.selectedIndex = 1;
  choice.dispatchEvent(new Event("change"));
  seen.second = look("token7");
  seen.images = document.images.length;
  seen.title = document.title;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.drawings = ["wide", "narrow"].map(
    (name) => document.querySelector("figure ." + name).getBoundingClientRect().height > 50);
  const small = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {
      const own = text.getBoundingClientRect();
      if (own.height && own.height < 9) small.push(text.textContent);
      if (own.width && own.right > box.right + 12) small.push("cut: " + text.textContent);
    }
  }
  seen.small = small;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
})();
"""


def _visit(page: str, folder: Path, *, width: int) -> dict[str, Any]:
    """What the probe saw at this width; in a frame, since a window has a least width."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    probed = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    probed = probed.replace(
        '<meta name="color-scheme"', f'<script>{PROBE}</script>\n<meta name="color-scheme"', 1
    )
    (folder / "page.html").write_text(probed, encoding="utf-8")
    frame = (
        f"<iframe id=f src=page.html style='width:{width}px;height:2000px'></iframe><script>"
        "setInterval(() => { const s = f.contentDocument?.getElementById('seen');"
        "if (s && !window.done) { done = 1; document.body.append(s.cloneNode(true)); } }, 50);"
        "</script>"
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,2200", "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(
    page: str, collection: Collection, tmp_path: Path, width: int
) -> None:
    seen = _visit(page, tmp_path, width=width)
    assert seen["errors"] == []
    assert [name for name in seen["requests"] if not name.startswith("data:")] == []
    assert seen["title"].startswith("Which tokens paid?")
    assert seen["images"] == 0
    assert seen["overflow"] <= 0
    assert seen["drawings"] == [width > 600, width < 600]
    assert seen["small"] == []
    for rows, group in (
        (seen["token7"], collection.groups[0]),
        (seen["second"], collection.groups[1]),
    ):
        place = group["label"].values.tolist().index("token7")
        assert rows[0][0] == "token7"
        assert rows[0][1] == str(group["class_count"].values[place])
        loss = over_seeds(group, "loss")["mean"].values[:, place]
        speed = over_seeds(group, "learning_speed")["mean"].values[:, place]
        shown = [cell.split(" S ") for cell in rows[0][2:5]]
        assert [float(cell) for cell, _ in shown] == pytest.approx(loss, abs=1e-3)
        assert [float(cell) for _, cell in shown] == pytest.approx(speed, abs=1e-2)
    assert [row[0] for row in seen["image"]] == ["<img␣src=x␣onerror=document.title='owned'>"]
    assert {row[0] for row in seen["the"][:2]} == {"␣the", "Ġthe"}
    assert seen["nothing"] == []
    assert seen["status"] == "Nothing holds this text."
