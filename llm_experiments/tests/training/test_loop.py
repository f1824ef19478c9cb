"""The training step against plain implementations of the same thing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from llm_experiments.configs import DataConfig, RunConfig
from llm_experiments.models.openelm import OpenELMConfig, OpenELMForCausalLM
from llm_experiments.models.presets import build_model, features
from llm_experiments.text.preparation import PreparedCorpus, prepare
from llm_experiments.text.tokenization import PAD_ID
from llm_experiments.training.loop import (
    Progress,
    batch_rows,
    compile_body,
    token_losses,
    train,
)
from llm_experiments.training.optimization import build_optimizer, loss_weights
from run_store import Attempt, Diverged, Run, Stopped, attempt

CPU = torch.device("cpu")
CONFIG = RunConfig(steps=12, batch_size=4, evaluate_every=5, learning_rate=3e-3, weight_decay=0.3)


def test_an_epoch_sees_every_sequence_once_whatever_the_batch() -> None:
    rows = [batch_rows(RunConfig(batch_size=6, seed=2), 15, batch) for batch in range(10)]
    stream = torch.cat(rows)
    for epoch in stream.split(15):
        assert epoch.sort().values.tolist() == list(range(15))
    other_cut = torch.cat([batch_rows(RunConfig(batch_size=20, seed=2), 15, b) for b in range(3)])
    assert torch.equal(stream, other_cut)
    assert not torch.equal(stream[:15], stream[15:30])
    other_seed = torch.cat([batch_rows(RunConfig(batch_size=6, seed=3), 15, b) for b in range(10)])
    assert not torch.equal(stream, other_seed)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_loss_weights_are_powers_of_the_counts_that_keep_the_sum(exponent: float) -> None:
    counts = torch.tensor([1000, 100, 10, 1, 0])
    weights = loss_weights(counts, exponent)
    assert (weights * counts).sum().item() == pytest.approx(counts.sum().item(), rel=1e-12)
    assert (weights[2] / weights[0]).item() == pytest.approx(100**exponent, rel=1e-12)
    assert torch.isfinite(weights).all()


LAST_NORM = ("transformer.norm.weight", "model.norm.weight")
TABLES = ("token_embeddings.weight", "embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("decay", "decayed"),
    [
        ("all", lambda name, parameter: True),
        ("matrices", lambda name, parameter: parameter.ndim == 2),
        ("embeddings", lambda name, parameter: name.endswith(TABLES[:2])),
        ("no-embeddings", lambda name, parameter: not name.endswith(TABLES[:2])),
        ("head", lambda name, parameter: name.endswith(TABLES[2])),
        ("body", lambda name, parameter: not name.endswith(TABLES)),
        ("last-norm", lambda name, parameter: name in LAST_NORM),
        ("inner", lambda name, parameter: not name.endswith(TABLES) and name not in LAST_NORM),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-tiny"])
def test_every_parameter_is_decayed_or_not_as_its_group_says(
    model_name: str, tied: bool, decay: str, decayed
) -> None:
    if tied and decay == "head":  # no matrix of that name: the head is the embedding matrix
        decayed = lambda name, parameter: name.endswith(TABLES)  # noqa: E731
    model = build_model(model_name, vocab_size=300, tied=tied)
    optimizer = build_optimizer(model, RunConfig(weight_decay=0.7, decay=decay))
    grouped = [(id(p), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(key for key, _ in grouped) == sorted(map(id, model.parameters()))
    found = dict(grouped)
    for name, parameter in model.named_parameters():
        assert found[id(parameter)] == (0.7 if decayed(name, parameter) else 0.0), name


@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-tiny"])
def test_untied_models_have_a_head_of_their_own(model_name: str, tmp_path: Path) -> None:
    model = build_model(model_name, vocab_size=300, tied=False)
    tied = build_model(model_name, vocab_size=300)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, tied)]
    assert sizes[0] - sizes[1] == 300 * 128
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(model(input_ids=ids).logits, 2 * before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    again = type(model).from_pretrained(tmp_path, attn_implementation=attention)
    # The weights to the last bit; products of them may round otherwise where they lie otherwise.
    read = again.state_dict()
    assert all(torch.equal(read[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model_name", "tolerance"), [("openelm-tiny", 1e-9), ("qwen2-tiny", 1e-5)]
)
def test_a_step_is_that_of_a_plain_loop_in_float64(
    model_name: str, tolerance: float, corpus: PreparedCorpus
) -> None:
    """Parity with transformers' own loss and torch's own optimizer.

    To 1e-9 in OpenELM; Qwen2 takes its norms in float32 in a model of any type.
    """
    tokens = torch.from_numpy(np.array(corpus.tokens[:4])).long()
    tokens[1, 9:] = PAD_ID
    ours = build_model(model_name, vocab_size=corpus.vocab_size, dtype=torch.float64)
    plain = build_model(model_name, vocab_size=corpus.vocab_size, dtype=torch.float64)
    optimizers = (
        build_optimizer(ours, CONFIG),
        torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.3),
    )
    labels = tokens.masked_fill(tokens == PAD_ID, -100)
    uniform = torch.ones(corpus.vocab_size, dtype=torch.float64)
    for _ in range(3):
        losses, targets = token_losses(ours, tokens, uniform)
        losses.objective.backward()
        # Not the loss that transformers returns, which it takes in float32.
        logits = plain(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        by_hand = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        mean = by_hand.sum() / (labels[:, 1:] != -100).sum()
        mean.backward()
        assert losses.objective.item() == pytest.approx(mean.item(), rel=tolerance)
        torch.testing.assert_close(losses.loss, by_hand, rtol=tolerance, atol=tolerance)
        assert torch.equal(targets, labels[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (mine - other).norm() <= tolerance * other.norm()


def run_of(folder: Path, config: RunConfig, data: DataConfig, corpus: PreparedCorpus) -> Run:
    return Run.create(folder, config.resolved(data, corpus.data_hash))


def test_the_record_is_what_was_trained_on(
    tmp_path: Path, data: DataConfig, corpus: PreparedCorpus
) -> None:
    run = run_of(tmp_path, CONFIG, data, corpus)
    seen: list[int] = []
    with attempt(run) as mine:
        train(CONFIG, corpus, mine, device=CPU, report=lambda progress: seen.append(progress.step))
    record = run.classes()
    assert seen == list(range(1, 13))
    assert record["step"].values.tolist() == [5, 10, 12]
    assert [row["step"] for row in run.scalars()] == [5, 10, 12]
    counts = torch.zeros(corpus.vocab_size, dtype=torch.int64)
    for batch in range(5):
        rows = corpus.tokens[batch_rows(CONFIG, 24, batch).numpy(), 1:].astype(np.int64)
        counts += torch.bincount(torch.from_numpy(rows.flatten()), minlength=corpus.vocab_size)
    assert record["count"].values[0].tolist() == counts.tolist()
    assert record["final_count"].values.tolist() == corpus.class_counts.tolist()
    for row, step in zip(run.scalars(), range(3), strict=True):
        weights = record["count"].values[step]
        average = np.nansum(record["loss"].values[step] * weights) / weights.sum()
        assert row["loss"] == pytest.approx(average, rel=1e-12)
    assert record["final_loss"].values[corpus.class_counts > 0].max() < 20
    assert not list(run.folder.glob("*.pt"))


def test_two_half_batches_make_the_step_of_one(
    tmp_path: Path, data: DataConfig, corpus: PreparedCorpus
) -> None:
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        config = RunConfig(
            steps=6, batch_size=batch_size, accumulation=accumulation, learning_rate=1e-3
        )
        run = run_of(tmp_path, config, data, corpus)
        with attempt(run) as mine:
            train(config, corpus, mine, device=CPU)
        losses.append(run.classes()["final_loss"].values)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_a_run_that_diverges_says_so_and_publishes_nothing(
    tmp_path: Path, data: DataConfig, corpus: PreparedCorpus
) -> None:
    config = RunConfig(steps=20, batch_size=4, evaluate_every=4, learning_rate=1e20)
    run = run_of(tmp_path, config, data, corpus)
    with attempt(run) as mine, pytest.raises(Diverged, match="step"):
        train(config, corpus, mine, device=CPU)
    assert not (run.folder / "classes.nc").exists()


# Rounding, relative: a unit in the last place of every weight after every step moved these losses
# by 8e-7; ATen's plain and AVX2 kernels, MKL's compatible ones and a second thread by 4e-7 at most.
# A beta2 of 0.9989 in place of 0.999 moves them by 1.3e-4.
GOLDEN_TOLERANCE = 2e-5


def test_golden_losses(tmp_path: Path, data: DataConfig, corpus: PreparedCorpus) -> None:
    """A change that should not change the numbers does not: compared with a file kept beside."""
    config = RunConfig(
        model="openelm-tiny", steps=50, batch_size=4, evaluate_every=10, learning_rate=3e-3
    )
    run = run_of(tmp_path, config, data, corpus)
    with attempt(run) as mine:
        train(config, corpus, mine, device=CPU)
    golden = np.loadtxt(Path(__file__).with_name("golden_losses.txt"))
    losses = [row["loss"] for row in run.scalars()]
    apart = np.abs(np.divide(losses, golden) - 1).max()
    kernels = torch.backends.cpu.get_cpu_capability()
    assert apart <= GOLDEN_TOLERANCE, (
        f"the losses {losses} are off golden_losses.txt by up to {apart:.1e}, relative; another "
        f"CPU may move them by {GOLDEN_TOLERANCE:g}. They depend on torch (first weights, order of "
        "the data, kernels), numpy (which draws the text) and tokenizers (its merges); "
        f"here: torch {torch.__version__} on {kernels}, numpy {np.__version__}, tokenizers "
        f"{tokenizers.__version__}. If none of these is new, what training computes has changed."
    )


@pytest.mark.parametrize("model", ["openelm-tiny", "qwen2-tiny"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(
    tmp_path: Path,
    data: DataConfig,
    corpus: PreparedCorpus,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced(monkeypatch)
    records = []
    for compiled in (False, True):
        config = replace(CONFIG, model=model, compile=compiled)
        run = run_of(tmp_path, config, data, corpus)
        with attempt(run) as mine:
            train(config, corpus, mine, device=CPU)
        records.append(run.classes())
    for name in ("loss", "final_loss"):
        np.testing.assert_allclose(records[1][name], records[0][name], rtol=1e-3, atol=1e-5)


def traced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Compile without a C++ compiler and its minutes: the graph is traced, and run as it is.

    Returns what torch counts of it from here on.
    """
    compiler = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiler)
    torch._dynamo.reset()
    counters["stats"].clear()
    return counters["stats"]


@pytest.mark.parametrize(("by_layer", "graphs"), [(True, 12), (False, 1)])
def test_every_layer_is_compiled(
    by_layer: bool, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if no two are alike, which are more than torch compiles by default."""
    stats = traced(monkeypatch)
    widths = [float(layer) for layer in range(1, 13)]
    sizes: dict[str, Any] = {"model_dim": 8, "head_dim": 2, "num_gqa_groups": 1}
    config = OpenELMConfig(
        vocab_size=16,
        num_transformer_layers=12,
        ffn_multipliers=widths,
        ffn_dim_divisor=8,
        **sizes,
    )
    model = OpenELMForCausalLM(config)
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        compile_body(model, by_layer=by_layer)
        features(model, torch.zeros(1, 4, dtype=torch.long))
    assert stats["unique_graphs"] == graphs


@pytest.mark.parametrize(("evaluation", "graphs"), [("stream", 1), ("final", 1), ("full", 2)])
def test_a_pass_that_is_made_once_is_not_compiled(
    tmp_path: Path,
    data: DataConfig,
    corpus: PreparedCorpus,
    evaluation: Any,
    graphs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass of one length of batches; the rest of a batch would be a further graph."""
    stats = traced(monkeypatch)
    config = replace(CONFIG, steps=4, batch_size=len(corpus.tokens), compile=True)
    run = run_of(tmp_path, replace(config, evaluate=evaluation), data, corpus)
    with attempt(run) as mine:
        train(replace(config, evaluate=evaluation), corpus, mine, device=CPU)
    assert stats["unique_graphs"] == graphs


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_to_single(
    tmp_path: Path, data: DataConfig, corpus: PreparedCorpus, precision: str
) -> None:
    losses = []
    for chosen in ("fp32", precision):
        config = RunConfig(steps=20, batch_size=4, learning_rate=1e-3, precision=chosen)
        run = run_of(tmp_path, config, data, corpus)
        with attempt(run) as mine:
            train(config, corpus, mine, device=CPU)
        losses.append(run.classes()["final_loss"].values)
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05, atol=0.02)


def test_what_is_evaluated_when(tmp_path: Path, data: DataConfig) -> None:
    corpus = prepare(replace(data, held_out=7))
    assert not {row.tobytes() for row in corpus.tokens} & {r.tobytes() for r in corpus.held_out}
    final_losses = {}
    for evaluation in ("stream", "final", "full"):
        config = replace(CONFIG, evaluate=evaluation)
        run = run_of(tmp_path, config, data, corpus)
        with attempt(run) as mine:
            train(config, corpus, mine, device=CPU)
        record = run.classes()
        assert record["held_out_count"].values.sum(axis=1).tolist() == [7 * 15] * 3
        assert ("full_loss" in record) == (evaluation == "full")
        final_losses[evaluation] = record["final_loss"].values
    assert np.isnan(final_losses["stream"]).all()
    # Evaluating between the steps leaves them as they were; another pass of it rounds in float32.
    np.testing.assert_allclose(final_losses["final"], final_losses["full"], rtol=1e-4)
    np.testing.assert_allclose(record["full_loss"].values[-1], final_losses["full"], rtol=1e-5)
    assert (record["full_count"].values == corpus.class_counts.numpy()).all()


@pytest.mark.parametrize(
    "options",
    [
        # In fp16 too, where the loss scale is part of the state, and with masks drawn at random.
        {"precision": "fp16", "dropout": 0.2, "label_smoothing": 0.1, "clip_gradient": 0.5},
        {"optimizer": "sgd", "decay_mode": "l2", "beta1": 0.0, "schedule": "linear"},
        {"optimizer": "sgd", "decay_mode": "l2", "initialisation": "huggingface"},
        {"optimizer": "sign", "schedule": "constant"},
        {"optimizer": "muon", "norm": "layernorm", "decay_exponent": 0.5},
        {"optimizer": "lion", "model": "qwen2-moe-tiny", "decay_until": 0.5},
        {"optimizer": "adamw-cautious", "precision": "fp16", "decay_exponent": 1.0},
    ],
)
def test_a_resumed_run_goes_on_where_it_was(
    tmp_path: Path, data: DataConfig, corpus: PreparedCorpus, options: dict[str, Any]
) -> None:
    config = replace(CONFIG, evaluate_every=3, accumulation=2, **options)

    class Unplugged(Exception):
        pass

    def unplug(progress: Progress) -> None:
        if progress.step == 8:
            raise Unplugged

    records = []
    for interrupted in (False, True):
        run = run_of(tmp_path / str(interrupted), config, data, corpus)
        with attempt(run) as mine:
            if interrupted:
                with pytest.raises(Unplugged):
                    train(config, corpus, mine, device=CPU, report=unplug)
            train(config, corpus, mine, device=CPU)
        records.append((run.folder / "classes.nc").read_bytes())
    assert records[0] == records[1]


def test_a_run_that_is_asked_to_stop_stops_after_any_step(
    tmp_path: Path,
    data: DataConfig,
    corpus: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_of(tmp_path / "whole", CONFIG, data, corpus)
    broken = run_of(tmp_path / "broken", CONFIG, data, corpus)
    with attempt(whole) as mine:
        train(CONFIG, corpus, mine, device=CPU)
    steps: list[int] = []

    def report(progress: Progress) -> None:
        steps.append(progress.step)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "should_stop", lambda mine: steps[-1] in (3, 7, 12))
        for step in (3, 7, 12):
            with pytest.raises(Stopped, match=f"step {step}"), attempt(broken) as mine:
                train(CONFIG, corpus, mine, device=CPU, report=report)
            assert broken.status == "waiting"
    with attempt(broken) as mine:
        train(CONFIG, corpus, mine, device=CPU, report=report)
    assert steps == list(range(1, 13))
    assert (broken.folder / "classes.nc").read_bytes() == (whole.folder / "classes.nc").read_bytes()
    assert [row["step"] for row in broken.scalars()] == [5, 10, 12]
