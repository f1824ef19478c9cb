"""Small synthetic studies: losses from the corrected law plus noise, and hostile token strings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from run_store import Run, attempt, class_record, publish

HOSTILE = (
    "<img src=x onerror=document.title='owned'>",
    "</script><script>document.title='owned'</script>",
    "$\\frac{1}{0}$ & \"quoted\" 'text'",
    "\u2028\u2029\x00\x1b[31m",
    "{{ 7 * 7 }}",
    "\ud800",
    "電影",
    "Ġthe",
    " the",
    "un\u202eseen",
    "un\0seen",
    "un\xa0seen",
    "un\U000e0041seen",
)


def zipf_counts(vocab_size: int, never: int = 5) -> np.ndarray:
    """Counts like those of text: the k-th class occurs about k^-1.25 times as often, some never."""
    rank = np.arange(1, vocab_size + 1)
    counts = np.maximum(1, np.floor(6.0 * vocab_size / rank**1.25)).astype(np.int64)
    counts[vocab_size - never :] = 0
    return counts


def law(counts: np.ndarray, critical_count: float) -> np.ndarray:
    """The corrected law, written out once more: -log(1 - (1 - 1/V) min(1, sqrt(n_c / n)))."""
    vocab_size = len(counts)
    share = np.minimum(1.0, np.sqrt(critical_count / np.maximum(counts, 1)))
    return -np.log1p(-(1 - 1 / vocab_size) * share)


def _accuracy(loss: np.ndarray) -> np.ndarray:
    return np.clip(1.02 * np.exp(-loss) - 0.02, 0, 1)


def record(
    counts: np.ndarray, critical_count: float, seed: int, steps: int = 20, every: int = 100
) -> Any:
    """A run's class record: losses fall from log V to the law's values, rare classes last."""
    generator = np.random.default_rng(seed)
    vocab_size = len(counts)
    seen = counts > 0
    final = law(counts, critical_count) * np.exp(0.1 * generator.standard_normal(vocab_size))
    rate = 0.05 + 0.5 * counts / counts.max()
    time = np.arange(1, steps + 1)[:, None]
    loss = final + (math.log(vocab_size) - final) * np.exp(-rate * time)
    count = generator.poisson(counts / steps, size=(steps, vocab_size))
    accuracy = _accuracy(loss)

    def mean(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.where(of > 0, values, np.nan)

    labels = [*HOSTILE, *(f"token{k}" for k in range(vocab_size - len(HOSTILE)))]
    return class_record(
        steps=every * np.arange(1, steps + 1),
        class_counts=counts,
        labels=labels[:vocab_size],
        count=count,
        loss=mean(loss, count),
        accuracy=mean(accuracy, count),
        final_count=counts,
        final_loss=mean(final, seen),
        final_accuracy=mean(_accuracy(final), seen),
    )


def make_run(
    folder: Path,
    *,
    weight_decay: float,
    seed: int,
    vocab_size: int = 300,
    critical_count: float | None = None,
    status: str = "finished",
    steps: int = 20,
    **config: Any,
) -> Run:
    """One run of a study, published unless its status says otherwise."""
    settings: Mapping[str, Any] = {
        "model": "openelm-tiny",
        "corpus": "python-docs",
        "weight_decay": weight_decay,
        "seed": seed,
        "steps": 100 * steps,
        "learning_rate": 2e-3,
        "batch_size": 16,
        "context": 64,
        "vocab_size": vocab_size,
    } | config
    run = Run.create(
        folder,
        settings,
        versions={"python": "3.11.2", "torch": "2.11.0"},
        device="cpu",
        git_commit="0123456789abcdef",
        data_hash="feed",
        command=["python", "-m", "llm_experiments", "sweep", "--recipe", "demo"],
        started="2025-01-01T00:00:00+00:00",
    )
    if status != "finished":
        error = "loss is not finite at step 70" if status == "diverged" else ""
        return end(run, status, error)
    fitted = 0.02 + 2 * weight_decay if critical_count is None else critical_count
    measured = record(zipf_counts(vocab_size), fitted, seed + 17 * int(10 * weight_decay), steps)
    publish(run, measured)
    return run


def end(run: Run, status: str, error: str = "") -> Run:
    """Let an attempt at a run end with a status and an error."""
    with attempt(run) as mine:
        mine.status, mine.error = status, error
    return run


def make_study(
    folder: Path,
    *,
    weight_decays: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    models: Sequence[str] = ("openelm-tiny",),
    **config: Any,
) -> Path:
    """A finished study: every model at every weight decay with every seed."""
    for model in models:
        for weight_decay in weight_decays:
            for seed in seeds:
                make_run(folder, weight_decay=weight_decay, seed=seed, model=model, **config)
    return folder
