"""The page of one audited model, as its parquet file gives it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from reports.__main__ import main
from reports.tests.test_browser import CHROMIUM

HOSTILE = "</script><img src=x onerror=document.title='owned'>"


def tokens() -> pd.DataFrame:
    size = 60
    frame = pd.DataFrame(
        {
            "id": range(size),
            "token": [HOSTILE, *(f"word{i}" for i in range(1, size))],
            "training_count": np.arange(size) ** 2,
            "count": 1,
            "loss": np.linspace(5, 1, size),
            "accuracy": 0.5,
            "against_loss": np.linspace(4, 1, size),
        }
    )
    frame.loc[3, ["count", "loss", "accuracy"]] = [0, np.nan, np.nan]
    table = {"title": HOSTILE, "head": ["bin", "loss"], "rows": [["3^0-3^1", HOSTILE]]}
    frame.attrs = {"audit": HOSTILE, "tables": [table, 3, {"title": "no rows"}]}
    return frame


@pytest.fixture
def page(tmp_path: Path) -> Path:
    tokens().to_parquet(tmp_path / "tokens.parquet")
    assert main(["build", str(tmp_path / "tokens.parquet")]) == 0
    return tmp_path / "tokens.html"


def test_the_page_has_averages_tables_and_nothing_that_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    losses = np.linspace(5, 1, 60).tolist()
    del losses[3]
    assert f"costs {np.mean(losses):.3f} nats" in text
    assert "<img" not in text
    assert text.count("<table") == 2
    assert text.count("<script") == 2
    assert "against_loss" not in text  # packed


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_the_search_shows_both_losses(page: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        complaints: list[str] = []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        tab.fill("#query", "word7")
        row = tab.locator("#tokens tbody tr").first.locator("th, td").all_text_contents()
        head = tab.locator("#tokens thead th").all_text_contents()
        tab.fill("#query", "word3")
        unseen = tab.locator("#tokens tbody tr").first.locator("th, td").all_text_contents()
        browser.close()
    losses = [np.linspace(start, 1, 60)[7] for start in (5, 4)]
    assert head == ["name", "count", "loss", "against_loss"]
    assert [cell.strip() for cell in row] == ["word7", "49", *(f"{x:.3f}" for x in losses)]
    assert unseen[2].strip() == "\u2013"
    assert complaints == []


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"no parquet"),
        lambda path: tokens().drop(columns="loss").to_parquet(path),
        lambda path: tokens().assign(training_count=-1).to_parquet(path),
        lambda path: tokens().assign(training_count=0).to_parquet(path),
        lambda path: tokens().assign(loss="x").to_parquet(path),
        lambda path: shutil.rmtree(path, ignore_errors=True),
    ],
)
def test_what_is_no_audit_is_named(
    change: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.parquet"
    change(path)  # type: ignore[operator]
    assert main(["build", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokens.parquet" in line
