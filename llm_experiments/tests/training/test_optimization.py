"""How weights are drawn and moved, against transformers, torch and loops by hand."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig, RunConfig, TrainingConfig
from llm_experiments.models.presets import build_model
from llm_experiments.recipes import recipe
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training import loop
from llm_experiments.training.optimization import build_optimizer, learning_rate, set_step
from run_store import Run, attempt, run_id

CPU = torch.device("cpu")
TABLES = ("embeddings.weight", "embed_tokens.weight", "lm_head.weight")
WRITTEN = Path(__file__).parents[3] / "reports/tests/written_before/runs/text"


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", partial(get_cosine_schedule_with_warmup, num_training_steps=50)),
        ("linear", partial(get_linear_schedule_with_warmup, num_training_steps=50)),
        ("constant", get_constant_schedule_with_warmup),
    ],
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(schedule: Any, theirs: Any, warmup: int) -> None:
    config = RunConfig(steps=50, warmup_steps=warmup, learning_rate=2e-3, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduled = theirs(optimizer, num_warmup_steps=warmup)
    for step in range(50):
        assert learning_rate(config, step) == pytest.approx(scheduled.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduled.step()


class TrainerInOrder(Trainer):
    """Trainer with our batches, and the mean cross-entropy in the model's own precision."""

    batches: list[Tensor]

    def get_train_dataloader(self) -> DataLoader[Any]:
        rows = [{"input_ids": row} for batch in self.batches for row in batch]
        return DataLoader(rows, batch_size=len(self.batches[0]))  # type: ignore[arg-type]

    def compute_loss(self, model: PreTrainedModel, inputs: Any, *_: Any, **__: Any) -> Tensor:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten())


@pytest.mark.parametrize(
    ("model_name", "clip", "schedule"),
    [
        ("openelm-tiny", 1.0, "cosine"),
        ("qwen2-tiny", 1.0, "linear"),
        ("openelm-tiny", 0.0, "cosine"),
    ],
)
def test_twenty_steps_are_those_of_transformers_trainer(
    model_name: str,
    clip: float,
    schedule: Any,
    corpus: PreparedCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RunConfig(
        model=model_name,
        steps=20,
        batch_size=4,
        learning_rate=3e-3,
        warmup_steps=5,
        weight_decay=0.3,
        decay="matrices",  # the Trainer spares norms and biases
        schedule=schedule,
        clip_gradient=clip,
        initialisation="huggingface",
        evaluate="stream",
    )
    tokens = torch.from_numpy(corpus.tokens.astype(np.int64))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_model", partial(build_model, dtype=torch.float64))
        with attempt(Run.create(tmp_path, {"trainer": 1})) as mine:
            ours = loop.train(config, corpus, mine, device=CPU)
    theirs = build_model(
        model_name,
        vocab_size=corpus.vocab_size,
        initialisation="huggingface",
        dtype=torch.float64,
    )
    trainer = TrainerInOrder(
        theirs,
        TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            warmup_steps=5,
            weight_decay=0.3,
            lr_scheduler_type=schedule,
            max_grad_norm=clip,
            optim="adamw_torch",
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.batches = [tokens[loop.batch_rows(config, len(tokens), step)] for step in range(20)]
    trainer.train()
    for (name, mine_), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Qwen2 takes its norms in float32 in a model of any type.
        tolerance = 1e-9 if model_name == "openelm-tiny" else 1e-4
        assert (mine_ - other).norm() <= tolerance * other.norm(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-tiny"])
def test_hugging_faces_weights_are_normal_with_one_width(model_name: str, tied: bool) -> None:
    built = partial(build_model, model_name, vocab_size=300, tied=tied)
    model = built(initialisation="huggingface")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            deviation = 1 / (2 * parameter.numel()) ** 0.5  # of a standard deviation, relative
            assert parameter.std().item() == pytest.approx(0.02, rel=5 * deviation), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / parameter.numel() ** 0.5, name
        else:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
    again, other = built(initialisation="huggingface"), built(initialisation="huggingface", seed=1)
    matrices = [next(iter(m.parameters())) for m in (model, again, other, built())]
    assert [torch.equal(matrices[0], matrix) for matrix in matrices] == [True, True, False, False]


def test_published_widths_of_qwen2_are_drawn_so_in_any_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [
        build_model("qwen2-0.5b", vocab_size=300, device="meta", initialisation=how)
        for how in ("corenet", "huggingface")
    ]
    assert {model.config.initializer_range for model in models} == {0.02}


class OneWeight(nn.Module):
    """What a decay group is asked of, with a single matrix (V, D)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    base_model = SimpleNamespace(norm=SimpleNamespace(weight=None))

    def get_input_embeddings(self) -> OneWeight:
        return self

    get_output_embeddings = get_input_embeddings


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz with Muon's numbers, in float64."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def by_hand(config: RunConfig, weight: Tensor, gradients: Tensor, counts: Tensor) -> Tensor:
    """The textbook's update, one line a step, in float64; row k is decayed by its own share."""
    mean, square, w = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    rate, b1, b2 = config.learning_rate, config.beta1, config.beta2
    shares = [[max(1, int(n)) ** config.decay_exponent] for n in counts]
    powers = torch.tensor(shares, dtype=torch.float64)
    decaying = round(config.decay_until * config.steps)
    for step, gradient in enumerate(gradients, start=1):
        decay = config.weight_decay * powers * len(powers) / powers.sum()
        if step > decaying:
            decay = 0 * decay
        g = gradient + decay * w if config.decay_mode == "l2" else gradient
        if config.optimizer in ("adamw", "adamw-cautious"):
            mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
            push = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + 1e-8)
        elif config.optimizer == "lion":
            push = (b1 * mean + (1 - b1) * g).sign()
            mean = b2 * mean + (1 - b2) * g
        elif config.optimizer == "muon":
            mean = 0.95 * mean + 0.05 * g
            push = 0.2 * max(w.shape) ** 0.5 * orthogonal(0.95 * mean + 0.05 * g)
        else:
            mean = b1 * mean + g
            push = mean if config.optimizer == "sgd" else mean.sign()
        if config.decay_mode == "l2":
            decay = 0 * decay
        if config.optimizer == "adamw-cautious":
            decay = decay * (push * w >= 0)
        w = w - rate * push - rate * decay * w
    return w


COUNTS = torch.tensor([7, 3, 0, 1])


@pytest.mark.parametrize("beta1", [0.0, 0.8])
@pytest.mark.parametrize(
    ("optimizer", "decay_mode", "beta2", "more"),
    [("adamw", "decoupled", 0.95, {}), ("adamw", "l2", 0.9, {}), ("sgd", "l2", 0.999, {}),
     ("sign", "decoupled", 0.999, {}), ("lion", "decoupled", 0.99, {}),
     ("adamw-cautious", "decoupled", 0.95, {}),
     ("adamw-cautious", "decoupled", 0.95, {"decay_exponent": 1.0, "decay_until": 0.5}),
     ("adamw", "decoupled", 0.95, {"decay_until": 0.5}),
     ("adamw", "decoupled", 0.95, {"decay_exponent": 0.5}),
     ("lion", "decoupled", 0.99, {"decay_exponent": -1.0, "decay_until": 0.7})],
)  # fmt: skip
def test_optimizers_are_the_textbooks(
    optimizer: Any, decay_mode: Any, beta1: float, beta2: float, more: dict[str, float]
) -> None:
    config = RunConfig(
        optimizer=optimizer,
        decay_mode=decay_mode,
        beta1=beta1,
        beta2=beta2,
        learning_rate=0.05,
        weight_decay=0.3,
        schedule="constant",
        warmup_steps=0,
        steps=6,
        **more,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    weight, gradients = torch.randn(4, 3).double(), torch.randn(6, 4, 3).double()
    gradients[:, 0] = 0  # a row that only decay moves
    model: Any = OneWeight(weight)
    built = build_optimizer(model, config, COUNTS)
    for step, gradient in enumerate(gradients):
        set_step(built, config, step)
        model.weight.grad = gradient.clone()
        built.step()
    expected = by_hand(config, weight, gradients, COUNTS)
    torch.testing.assert_close(model.weight.data, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_name", ["openelm-tiny", "qwen2-moe-tiny"])
def test_muon_moves_the_matrices_of_the_body_and_adamw_the_rest(model_name: str) -> None:
    model = build_model(model_name, vocab_size=300, tied=False, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"learning_rate": 0.01, "weight_decay": 0.3, "steps": 3, "warmup_steps": 0}
    config = RunConfig(optimizer="muon", schedule="constant", **settings)  # type: ignore[arg-type]
    adamw = replace(config, optimizer="adamw")
    optimizer = build_optimizer(model, config)
    torch.manual_seed(0)
    gradients = {name: torch.randn(3, *p.shape).double() for name, p in before.items()}
    for step in range(3):
        set_step(optimizer, config, step)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    ones = torch.ones(1)
    for name, parameter in model.named_parameters():
        of_muon = parameter.ndim == 2 and not name.endswith(TABLES)
        flat = parameter.flatten(0, -2) if parameter.ndim == 3 else parameter
        expected = by_hand(
            config if of_muon else adamw,
            before[name].reshape(flat.shape),
            gradients[name].reshape(3, *flat.shape),
            ones,
        )
        # torch takes Muon's products in bfloat16, to 8 bits, and its steps amplify their errors.
        moved, wanted = parameter - before[name], expected.view_as(parameter) - before[name]
        assert (moved - wanted).norm() <= (0.05 if of_muon else 1e-9) * wanted.norm(), name


def test_decay_is_left_out_of_a_step_that_overflowed(corpus: PreparedCorpus) -> None:
    """As torch's own decay is: a GradScaler calls a fused optimizer in any case."""
    for name in ("adamw", "adamw-cautious"):
        model = build_model("openelm-tiny", vocab_size=300)
        config = RunConfig(optimizer=name, weight_decay=0.5, decay_until=0.9, warmup_steps=0)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, config)
        set_step(optimizer, config, 0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model(input_ids=torch.arange(8)[None]).logits.sum() * torch.inf).backward()
        scaler.step(optimizer)
        assert all(map(torch.equal, before, model.parameters()))


SET = {
    "schedule": "linear",
    "optimizer": "sign",
    "beta1": 0.8,
    "beta2": 0.99,
    "clip_gradient": 1.0,
    "initialisation": "huggingface",
    "norm": "layernorm",
    "decay_exponent": 0.5,
    "decay_until": 0.8,
}


@pytest.mark.parametrize("name", SET)
def test_an_option_that_is_set_is_in_the_id_and_in_words(name: str) -> None:
    data, plain = DataConfig(), RunConfig(weight_decay=0.1)
    changed = replace(plain, **{name: SET[name]})  # type: ignore[arg-type]
    assert name not in plain.resolved(data, "hash")
    assert changed.resolved(data, "hash") == plain.resolved(data, "hash") | {name: SET[name]}
    assert changed.describe() == f"{plain.describe()}, {name.replace('_', ' ')} {SET[name]}"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    shown = capsys.readouterr().out
    for field in fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert set(RunConfig.added) == set(SET)


def test_runs_that_were_there_before_the_options_keep_their_ids() -> None:
    """Of a study on disk; and of the demo, whose ids were noted before."""
    for manifest in WRITTEN.glob("*/manifest.json"):
        config = json.loads(manifest.read_text(encoding="ascii"))["config"]
        own = {f.name: config[f.name] for f in fields(RunConfig) if f.name in config}
        rest = {f.name: config[f.name] for f in fields(DataConfig) if f.name in config}
        again = RunConfig(**own).resolved(DataConfig(**rest), config["data_hash"])
        assert run_id(again) == manifest.parent.name
    data_hash = "5054033f9d1aa3ec820c2d2ef4b87b9b4bb3f5833dc36838a11608cba5d8a0a2"
    ids = [
        run_id(cell.resolved(grid.data, data_hash))
        for grid in recipe("demo")
        for cell in grid.cells()
    ]
    assert ids == [
        *("6d3d86384c3e", "e72ea530a169", "90cc3f357f99", "8ab4d5c149e2", "99137786de38"),
        *("6ccedb98385e", "03fa5eeefb61", "912841cd064f", "8350f5d87c50", "ae74c19860ea"),
        *("34a7dddde0cb", "d7ad574b0fed"),
    ]
