"""The study in small, on real reviews: who pays for weight decay, and what repairs it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from frequency_bins import (
    FrequencyBins,
    average_loss,
    bin_summary,
    token_balanced_loss,
)
from llm_experiments.configs import DataConfig, SweepConfig, TrainingConfig
from llm_experiments.sweep import sweep
from llm_experiments.tests.conftest import SHARED, needs_shared
from llm_experiments.text.corpora import CorpusConfig, load_corpus
from run_store import read_study

Losses = tuple[float, float, np.ndarray]  # average, token-balanced, by frequency bin


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[float, float], Losses]:
    """Losses of the training set at the end, by weight decay and loss weight exponent."""
    folder = tmp_path_factory.mktemp("imdb")
    reviews = load_corpus(CorpusConfig(corpus="imdb", data_dir=SHARED / "data/imdb"))
    (folder / "reviews.txt").write_text("\n\n".join(reviews[:300]), encoding="utf-8")
    damage = SweepConfig(
        study="s",
        runs_dir=folder / "runs",
        models=("openelm-tiny",),
        weight_decays=(0.0, 1.0),
        training=TrainingConfig(steps=160, batch_size=16, learning_rate=5e-3, evaluate_every=160),
        data=DataConfig(
            corpus="text",
            data_dir=folder,
            vocab_size=512,
            context=32,
            packing=True,
            num_sequences=160,
            cache_dir=folder / "cache",
        ),
        device="cpu",
    )
    repair = replace(damage, weight_decays=(1.0,), loss_weight_exponents=(0.25,))
    assert sweep(damage, repair)["finished"] == 3
    return {
        (run.config["weight_decay"], run.config["loss_weight_exponent"]): losses_of(run.classes())
        for run in read_study(damage.study_folder).runs
    }


def losses_of(record: xr.Dataset) -> Losses:
    counts, losses = record["class_count"].values, record["final_loss"].values
    by_bin = bin_summary(FrequencyBins.powers(counts), losses).mean
    return float(average_loss(counts, losses)), float(token_balanced_loss(counts, losses)), by_bin


@needs_shared("data/imdb")
def test_rare_tokens_pay_for_weight_decay(measured: dict[tuple[float, float], Losses]) -> None:
    average, balanced, by_bin = measured[1.0, 0.0]
    average_before, balanced_before, by_bin_before = measured[0.0, 0.0]
    rise = average - average_before
    assert rise > 0.1
    assert balanced - balanced_before > 1.2 * rise
    assert by_bin[0] - by_bin_before[0] > 2 * (by_bin[-1] - by_bin_before[-1])


@needs_shared("data/imdb")
def test_weighting_by_the_fourth_root_beats_no_weighting_on_both(
    measured: dict[tuple[float, float], Losses],
) -> None:
    for weighted, plain in zip(measured[1.0, 0.25][:2], measured[1.0, 0.0][:2], strict=True):
        assert weighted < 0.9 * plain
