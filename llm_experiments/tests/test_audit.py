"""Audit and Trainer callback against sums taken by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from llm_experiments.__main__ import main
from llm_experiments.audit import audit, load, tokenize
from llm_experiments.callback import TokenMetricsCallback
from llm_experiments.configs import DataConfig
from llm_experiments.corpora import load_corpus
from llm_experiments.models.presets import build_model
from llm_experiments.preparation import PreparedCorpus
from llm_experiments.training import save_model


@pytest.fixture(scope="module", params=["openelm-tiny", "qwen2-tiny"])
def checkpoint(
    request: pytest.FixtureRequest, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(build_model(request.param, vocab_size=corpus.vocab_size), corpus, folder)
    return folder


def test_audit_is_the_sum_by_hand(checkpoint: Path, data: DataConfig) -> None:
    model, tokenizer = load(checkpoint)
    documents = load_corpus(data)[:9]
    sequences = tokenize(tokenizer, documents, 20)
    metrics = audit(model, [*sequences, sequences[0][:7]], batch_size=4)
    losses = np.zeros(metrics.num_classes)
    counts = np.zeros(metrics.num_classes, dtype=int)
    for sequence in [*sequences, sequences[0][:7]]:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        for position, target in enumerate(sequence[1:].tolist()):
            losses[target] += F.cross_entropy(logits[position], sequence[position + 1]).item()
            counts[target] += 1
    assert metrics.count.tolist() == counts.tolist()
    np.testing.assert_allclose(metrics.loss_sum.numpy(), losses, rtol=1e-4)


def test_the_command_prints_bins_and_writes_every_token(
    checkpoint: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens.csv"
    corpus = ["--corpus", "text", "--data-dir", str(data.data_dir), "--documents", "5"]
    assert main(["audit", "--checkpoint", str(checkpoint), *corpus, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3^0-3^1" in shown
    assert "token-balanced" in shown
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300
    assert sum(int(row["count"]) for row in rows) > 0


def test_what_cannot_be_audited(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{")
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["audit", "--checkpoint", str(folder), "--corpus", "python-docs"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line


def test_the_callback_records_what_the_trainer_trains(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    tokens = torch.from_numpy(np.array(corpus.tokens)).long()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.steps == [2, 4, 6]
    total = sum(window.count for window in callback.history)
    assert total.tolist() == corpus.class_counts.tolist()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for window, loss in zip(callback.history, logged, strict=True):
        average = float(window.loss_sum.sum() / window.count.sum())
        assert average == pytest.approx(loss, rel=1e-3)


def test_a_tokenizer_of_another_model_is_refused(corpus: PreparedCorpus, tmp_path: Path) -> None:
    save_model(build_model("qwen2-tiny", vocab_size=280), corpus, tmp_path)
    with pytest.raises(ValueError, match="300 tokens, the model 280"):
        load(tmp_path)
