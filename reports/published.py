"""What the paper prints, beside what was measured in its own setting."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import xarray as xr

from frequency_bins import predict_loss
from llm_experiments.training.kappa import kappa
from reports.tables import METRICS, table_1

PUBLISHED_DECAYS = (0.0, 0.1, 0.3, 0.5, 1.0)
# Table 1 of arXiv 2410.11985: mean and standard deviation by weight decay.
PUBLISHED_TABLE_1 = {
    "average_loss": ((0.051, 0.052, 0.054, 0.056, 0.068), (0.000, 0.000, 0.000, 0.000, 0.001)),
    "token_balanced_loss": (
        (0.066, 0.070, 0.078, 0.090, 0.163),
        (0.001, 0.001, 0.001, 0.002, 0.004),
    ),
    "token_balanced_perplexity": (
        (1.069, 1.073, 1.081, 1.095, 1.177),
        (0.003, 0.003, 0.003, 0.003, 0.003),
    ),
    "token_balanced_accuracy": (
        (98.798, 98.781, 98.778, 98.759, 98.714),
        (0.031, 0.029, 0.032, 0.028, 0.029),
    ),
}
# Section 3: OpenELM 270M on IMDB; a field that a config lacks counts as the paper's.
PAPER_SETTING: dict[str, Any] = {
    "model": "openelm-270m",
    "corpus": "imdb",
    "vocab_size": 32005,
    "context": 128,
    "steps": 10_000,
    "learning_rate": 5e-5,
    "warmup_steps": 10,
    "packing": False,
    "num_sequences": None,
    "decay": "all",
    "decay_mode": "decoupled",
    "optimizer": "adamw",
    "beta1": 0.9,
    "beta2": 0.999,
    "schedule": "cosine",
    "loss_weight_exponent": 0,
    "tie_embeddings": True,
    "dropout": 0,
    "label_smoothing": 0,
}
SEQUENCES_A_STEP = 64


def is_paper_setting(config: dict[str, Any]) -> bool:
    """Whether a group of runs uses the setting of the paper's Table 1."""
    same = all(config.get(name, value) == value for name, value in PAPER_SETTING.items())
    sequences = (config.get("batch_size") or 0) * (config.get("accumulation") or 1)
    return same and {"model", "corpus"} <= set(config) and sequences == SEQUENCES_A_STEP


def published_table_1(*groups: xr.Dataset) -> pd.DataFrame:
    """`table_1` of the groups in the paper's setting, with the paper's numbers and the difference.

    Columns runs, metric, weight_decay, n, mean, std, published, published_std, difference
    (measured minus published), predicted (by the margin law from the paper's first two columns, of
    the token-balanced loss alone). Empty where no group has the setting.
    """
    chosen = [group for group in groups if is_paper_setting(group.attrs["config"])]
    if not chosen:
        return pd.DataFrame()
    printed = {
        (METRICS[name], decay): (mean, std)
        for name, (means, stds) in PUBLISHED_TABLE_1.items()
        for decay, mean, std in zip(PUBLISHED_DECAYS, means, stds, strict=True)
    }
    frame = table_1(*chosen)
    cells = [
        printed.get((metric, decay), (math.nan, math.nan))
        for metric, decay in zip(frame["metric"], frame["weight_decay"], strict=True)
    ]
    frame["published"] = [mean for mean, _ in cells]
    frame["published_std"] = [std for _, std in cells]
    frame["predicted"] = [
        _predicted(decay) if metric == METRICS["token_balanced_loss"] else math.nan
        for metric, decay in zip(frame["metric"], frame["weight_decay"], strict=True)
    ]
    return frame.assign(difference=frame["mean"] - frame["published"])


def _predicted(weight_decay: float) -> float:
    """The paper's token-balanced loss at a decay above those of its first two columns."""
    without, at = PUBLISHED_TABLE_1["token_balanced_loss"][0][:2]
    if weight_decay <= (start := PUBLISHED_DECAYS[1]):
        return math.nan
    kappas = (kappa(PAPER_SETTING | {"weight_decay": decay}) for decay in (start, weight_decay))
    vocab_size = PAPER_SETTING["vocab_size"]
    return float(predict_loss([without], [at], *kappas, vocab_size=vocab_size)[0])
