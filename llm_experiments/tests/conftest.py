"""A small corpus made of seeded pseudo-English, and what every test of this package shares."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy as np
import pytest

from llm_experiments.configs import DataConfig
from llm_experiments.text.preparation import PreparedCorpus, prepare

SHARED = Path(__file__).parents[3] / "shared"
VOCAB_SIZE = 300


def needs_shared(path: str) -> pytest.MarkDecorator:
    """Skip where a file of the shared folder beside the checkout is absent."""
    return pytest.mark.skipif(
        not (SHARED / path).exists(), reason=f"../shared/{path} is not on this machine"
    )


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of .txt files: words drawn by Zipf's law, in paragraphs."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, generator.integers(2, 8))) for _ in range(200)]
    frequency = 1 / np.arange(1, 201)
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        paragraphs = (
            " ".join(generator.choice(words, 40, p=frequency / frequency.sum())) for _ in range(40)
        )
        (folder / f"part-{number}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        corpus="text",
        data_dir=text_folder,
        vocab_size=VOCAB_SIZE,
        context=16,
        packing=True,
        num_sequences=24,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


@pytest.fixture(scope="session")
def corpus(data: DataConfig) -> PreparedCorpus:
    return prepare(data)
