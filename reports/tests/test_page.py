"""The page: complete, offline, safe with any text, and readable without eyes or mouse."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from reports import figures
from reports.answer import answer
from reports.groups import display_label, over_seeds
from reports.page import _palette, inline_svg, render
from reports.reading import Collection, collect
from reports.table_views import table_views
from reports.tests.studies import HOSTILE, end, make_run, make_study, record
from reports.token_search import NO_LOSS, pack
from run_store import Run, publish

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Every element with its attributes, and the text of the page outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def parsed(page: str) -> Page:
    return Page(page)


def test_elements_are_balanced_and_ids_are_unique(parsed: Page) -> None:
    assert not parsed.open
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched(page: str, parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name.removeprefix("xlink:") in ("src", "href", "srcset", "data", "action"):
                assert value is not None
                assert value.startswith(("#", "data:")), (tag, name, value[:80])
    outside = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert all(address.startswith("http://www.w3.org/") for address in outside), outside
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_only_our_script_may_run(page: str) -> None:
    script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"\son[a-z]+=", re.sub(r">[^<]*<", "><", page))


def test_it_can_be_read_without_eyes_or_mouse(parsed: Page) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    drawings = [svg for svg in parsed.all("svg") if svg.get("role") == "img"]
    assert len(drawings) == len(parsed.all("svg")) == 22
    assert all(len(svg["aria-label"] or "") > 40 for svg in drawings)
    assert parsed.all("html")[0]["lang"] == "en"
    assert all(th.get("scope") for th in parsed.all("th"))
    assert parsed.all("main")
    scrolled = [a for a in parsed.all("div") if a.get("class") == "scroll"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolled)


def test_the_answer_is_at_the_top_with_its_numbers(page: str, collection: Collection) -> None:
    said = answer(collection.groups)
    assert said.sentence.startswith("The rarest tokens paid: as weight decay went from 0 to 1")
    for change in said.changes:
        assert change.rare[1] - change.rare[0] > change.average[1] - change.average[0]
        assert f"{change.rare[0]:.2f} to {change.rare[1]:.2f} ({change.name})" in said.sentence
    assert page.index(said.sentence) < page.index("<figure")


def test_the_answer_follows_the_data(tmp_path: Path) -> None:
    """Where the loss falls with weight decay the page must not say that rare tokens paid."""
    make_run(tmp_path, weight_decay=0.0, seed=0, critical_count=2.0)
    make_run(tmp_path, weight_decay=1.0, seed=0, critical_count=0.2)
    assert answer(collect([tmp_path]).groups).sentence.startswith("No tokens paid")


def test_classes_of_images_are_not_called_tokens(tmp_path: Path) -> None:
    for weight_decay in (0.0, 1.0):
        run = make_run(tmp_path, weight_decay=weight_decay, seed=0, model="resnet9")
        config = {k: v for k, v in run.config.items() if k not in ("corpus", "vocab_size")}
        images = Run.create(tmp_path / "images", config | {"dataset": "digits"})
        publish(images, run.classes().assign(label=run.classes()["label"]))
    groups = collect([tmp_path / "images"]).groups
    assert answer(groups).sentence.startswith("The rarest classes paid")
    shown = [text for view in table_views(groups) for text in (view.title, view.caption)]
    shown += [figures.figure_4(*groups).caption, figures.figure_8(*groups).title]
    assert not [text for text in shown if "token" in text.lower()]


def test_one_frequency_bin_gives_no_answer(tmp_path: Path) -> None:
    counts = np.full(20, 50)
    for weight_decay in (0.0, 1.0):
        run = make_run(tmp_path, weight_decay=weight_decay, seed=0, status="running")
        publish(run, record(counts, 1 + weight_decay, 0))
    assert answer(collect([tmp_path]).groups).sentence.startswith("No answer: all tokens occur")


def test_gaps_are_listed(parsed: Page) -> None:
    text = " ".join(parsed.text.split())
    assert "6 runs missing or unfinished" in text
    assert "openelm-tiny, weight decay 2, seed 0" in text
    assert "loss is not finite at step 70" in text


def test_how_it_was_run_is_said(parsed: Page) -> None:
    for fact in ("0123456789abcdef", "torch 2.11.0", "python -m llm_experiments sweep", "cpu"):
        assert fact in parsed.text


def test_colours_change_with_the_theme_and_ids_are_apart(collection: Collection) -> None:
    decays = [0.0, 0.3, 1.0]
    svg = inline_svg(figures.figure_7a(*collection.groups), "one", decays)
    assert "var(--wd0)" in svg
    assert "var(--wd2)" in svg
    for colour, _ in _palette(decays).values():
        assert f": {colour}" not in svg
    assert 'id="one-' in svg
    assert "url(#one-" in svg
    assert "http://" not in svg.replace("http://www.w3.org/", "")


@pytest.mark.usefixtures("one_figure")
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Names from configs, errors and paths; the labels go through the packed search alone."""
    attack = "<img src=x onerror=alert(1)>"
    make_run(tmp_path / "s", weight_decay=0.0, seed=0, model=attack, corpus='"><script>x</script>')
    run = make_run(tmp_path / "s", weight_decay=1.0, seed=0, model=attack, status="running",
                   corpus='"><script>x</script>')  # fmt: skip
    end(run, "failed", f"</td><script>alert(2)</script>{attack}")
    html = render(collect([tmp_path / "s"]))
    parsed = Page(html)
    assert not parsed.all("img")
    assert len(parsed.all("script")) == 2
    assert attack in parsed.text
    assert not any(label in html for label in HOSTILE if "<" in label)


def test_packed_search_round_trip(collection: Collection) -> None:
    packed = gzip.decompress(base64.b64decode(pack(collection.groups)))
    header, _, arrays = packed.partition(b"\n")
    told = json.loads(header)
    (words,) = told["vocabularies"]
    group = collection.groups[0]
    assert words["labels"] == [display_label(label) for label in group["label"].values]
    size = len(words["labels"])
    counts = np.frombuffer(arrays, "<u4", count=size)
    np.testing.assert_array_equal(counts, group["class_count"].values)
    loss = np.frombuffer(arrays, "<u2", count=3 * size, offset=4 * size).reshape(3, size)
    mean = over_seeds(group, "loss")["mean"].values
    np.testing.assert_array_equal(loss == NO_LOSS, np.isnan(mean))
    np.testing.assert_allclose(loss[loss != NO_LOSS] / 1000, mean[loss != NO_LOSS], atol=5.1e-4)
    cells = 3 * size
    each = cells * (2 + 1 + len(told["groups"][0]["steps"])) + size
    assert len(arrays) == 4 * size + 2 * each
    seen = np.frombuffer(arrays, "<u1", count=size, offset=3 * size + each)
    share = group["windows_seen"].values.mean(axis=0)
    np.testing.assert_array_equal(seen == 255, np.isnan(share))
    np.testing.assert_allclose(seen[seen < 255] / 100, share[seen < 255], atol=5.1e-3)


@pytest.mark.usefixtures("one_figure")
def test_the_page_is_the_same_every_time(collection: Collection) -> None:
    assert render(collection) == render(collection)


def test_a_study_without_finished_runs_has_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0, status="running")
    parsed = Page(render(collect([tmp_path])))
    assert "no run of this study has a final loss" in parsed.text
    assert "openelm-tiny, weight decay 0, seed 0" in parsed.text


def test_many_settings_give_a_short_answer(tmp_path: Path) -> None:
    models = [f"model-{k}" for k in range(5)]
    study = make_study(tmp_path, weight_decays=(0.0, 1.0), seeds=(0,), models=models)
    said = answer(collect([study]).groups)
    assert len(said.changes) == 5
    assert len(said.sentence) < 250
    rise = said.changes[0].rare[1] - said.changes[0].rare[0]
    assert f"rarest changed by {rise:+.2f} nats" in said.sentence

    (group,) = (group for group in collect([study]).groups if group.attrs["name"] == "model-0")
    twice = group.assign(bin_loss=2 * group["bin_loss"])
    said = answer([group, group, group, twice])
    assert f"rarest changed by {rise:+.2f} to {2 * rise:+.2f} nats" in said.sentence


def test_a_corpus_may_have_any_name(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.5, seed=3, corpus="a\ud800b")
    assert "a\\ud800b" in render(collect([tmp_path]))
