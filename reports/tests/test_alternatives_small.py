"""The recipe of alternatives, cut down: its sweep, its models on the tasks, and their page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from llm_experiments.__main__ import main as language_models
from reports.__main__ import main as report

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "lmnrst"]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """50 reviews a split in IMDB's layout; the first word tells the mood."""
    folder = tmp_path / "imdb"
    folder.mkdir()
    generator = np.random.default_rng(0)
    frequency = 1 / np.arange(1, len(WORDS) + 1)
    for split in ("train", "test"):
        labels = np.arange(50) % 2
        drawn = generator.choice(WORDS, (50, 40), p=frequency / frequency.sum())
        texts = [
            f"{('poor', 'good')[label]} {' '.join(row)}"
            for label, row in zip(labels, drawn, strict=True)
        ]
        table = pa.table({"text": texts, "label": labels})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_small_recipe_cut_down_answers_the_three_questions(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--vocab-size", "300", "--context", "16", "--num-sequences", "16", "--batch-size", "4"]
    again = ["--steps", "6", "--evaluate-every", "3", "--device", "cpu", "--runs-in-parallel", "1"]
    recipe = ["sweep", "--recipe", "alternatives-small", "--data-dir", str(reviews), "--seed", "0"]
    assert language_models([*recipe, *sizes, *again]) == 0
    study = Path("runs/alternatives-small")
    assert language_models(["downstream", "--study", str(study), "--device", "cpu"]) == 0
    assert report(["build", str(study)]) == 0
    page = (study / "report.html").read_text(encoding="utf-8")
    section = page[page.index('id="alternatives-section"') :]
    section = section[: section.index("</section>")]
    assert section.count("<figure") == section.count("<table") == 2
    for question in (
        "in a task",
        "Is it decay, or any regularisation?",
        "Does another optimizer avoid it?",
        "Does a repair?",
        "Not run: two matrices for embeddings and head, a mixture of experts, Adam with L2",
    ):
        assert question in section
    for name in ("dropout", "layernorm", "muon", "lion", "adamw-cautious", "decay by count^1"):
        assert f'<th scope="row">{name}</th>' in section
    # One seed has no interval over seeds, so nothing is claimed of the settings.
    assert "lower token-balanced loss" not in section
