"""The Trainer callback against sums taken by hand, in the Trainers that people have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from frequency_bins import ClassMetrics
from llm_experiments.callback import TokenMetricsCallback
from llm_experiments.models.presets import build_model
from llm_experiments.text.preparation import PreparedCorpus


def arguments_for(folder: Path, **more: Any) -> TrainingArguments:
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), num_train_epochs=1, **(quiet | more))


def test_the_callback_records_what_the_trainer_trains(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """Against Algorithm 1 with a dictionary, over accumulated batches, -100s and an evaluation."""
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    tokens = torch.from_numpy(np.array(corpus.tokens)).long()
    labels = tokens.masked_fill(tokens % 3 == 0, -100)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    arguments = arguments_for(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    dictionary: dict[int, list[tuple[float, bool]]] = {}

    def algorithm_1(model: PreTrainedModel, args: Any, kwargs: Any, output: Any) -> None:
        if not model.training:
            return
        for sequence, targets in zip(output.logits, kwargs["labels"], strict=True):
            for row, target in zip(sequence[:-1], targets[1:].tolist(), strict=True):
                if target != -100:
                    loss = float(-row.detach().double().log_softmax(0)[target])
                    right = int(row.argmax()) == target
                    dictionary.setdefault(target, []).append((loss, right))

    model.register_forward_hook(algorithm_1, with_kwargs=True)
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.steps == [2, 4, 6]
    assert sum(map(len, dictionary.values())) == int((labels[:, 1:] != -100).sum())
    for target in range(corpus.vocab_size):
        entries = dictionary.get(target, [])
        assert sum(int(window.count[target]) for window in callback.history) == len(entries)
        right = sum(correct for _, correct in entries)
        assert sum(int(window.correct[target]) for window in callback.history) == right
        summed = sum(float(window.loss_sum[target]) for window in callback.history)
        assert summed == pytest.approx(sum(loss for loss, _ in entries), rel=1e-5)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_the_callback_knows_of_mixed_precision(
    corpus: PreparedCorpus, tmp_path: Path, precision: dict[str, bool]
) -> None:
    """A model whose logits are all alike: in half precision token 0 alone is predicted."""
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    row = torch.arange(8)
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    arguments = arguments_for(tmp_path, logging_steps=1, **precision)
    rows = [{"input_ids": row, "labels": row.flip(0)}]
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    (window,) = callback.history
    assert window.correct.tolist()[:7] == ([1, 0, 0, 0, 0, 0, 0] if precision else [1] * 7)


# ---- Trainers of others: weights stand still, so that a literal loop is exact


class Rows(list[dict[str, torch.Tensor]]):
    """Sequences that are their own labels."""

    def __init__(self, corpus: PreparedCorpus) -> None:
        tokens = torch.from_numpy(np.array(corpus.tokens)).long()
        super().__init__({"input_ids": row, "labels": row.clone()} for row in tokens)


def by_hand(model: PreTrainedModel, rows: Rows) -> ClassMetrics:
    metrics = ClassMetrics(model.config.vocab_size)
    model.eval()
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"][None]).logits[0].double()
        for place, target in enumerate(row["labels"][1:]):
            loss = logits[place].logsumexp(0) - logits[place, target]
            metrics.update(loss, target, logits[place].argmax() == target)
    return metrics


def assert_recorded(history: list[ClassMetrics], expected: ClassMetrics) -> None:
    total = ClassMetrics(expected.num_classes)
    for window in history:
        assert window.device.type == "cpu"
        total.merge(window)
    assert total.count.tolist() == expected.count.tolist()
    assert total.correct.tolist() == expected.correct.tolist()
    np.testing.assert_allclose(total.loss_sum, expected.loss_sum, rtol=1e-5)


class RoomForTwo(Trainer):
    """Of a device: the forward pass fits, the backward pass of more than two rows does not."""

    def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            model.train()
            loss = self.compute_loss(model, dict(inputs))
            if self.backward_begins:
                loss.register_hook(lambda gradient: self.fail())
                loss.backward()
            self.fail()
        return super().training_step(model, inputs, *rest, **more)

    backward_begins = False

    def fail(self) -> None:
        raise RuntimeError("CUDA out of memory.")


class FailsInside(RoomForTwo):
    backward_begins = True


class TriesAgain(FailsInside):
    """Halves a batch by itself, within a step."""

    def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        try:
            return super().training_step(model, inputs, *rest, **more)
        except RuntimeError:
            halves = [{k: v[part] for k, v in inputs.items()} for part in (slice(2), slice(2, 4))]
            first, second = (super(TriesAgain, self).training_step(model, half) for half in halves)
            return (first + second) / 2


class OwnLoss(Trainer):
    """The loss of the documentation's examples: labels are taken away first."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        labels = inputs.pop("labels")
        return own_loss(model(**inputs), labels)


class Teacher(Trainer):
    """Looks at what the model says before the pass that is trained."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        with torch.no_grad():
            model(**inputs)
        return super().compute_loss(model, inputs, *rest, **more)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("trainer", "given", "settings"),
    [
        (Trainer, {}, {}),
        (Trainer, {}, {"gradient_accumulation_steps": 4}),
        (Trainer, {}, {"torch_compile": True, "torch_compile_backend": "eager"}),
        (Trainer, {"compute_loss_func": own_loss}, {"dataloader_num_workers": 1}),
        (Trainer, {}, {"label_smoothing_factor": 0.1}),
        (OwnLoss, {}, {"gradient_accumulation_steps": 2}),
        (Teacher, {}, {}),
        *(
            (kind, {}, {"per_device_train_batch_size": 8, "auto_find_batch_size": True})
            for kind in (RoomForTwo, FailsInside)
        ),
        (TriesAgain, {}, {"per_device_train_batch_size": 4}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_what_steps_were_made_of_is_recorded(
    trainer: type[Trainer],
    given: dict[str, Any],
    settings: dict[str, Any],
    corpus: PreparedCorpus,
    tmp_path: Path,
) -> None:
    rows = Rows(corpus)
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    model.train()
    model(**{name: column[None] for name, column in rows[0].items()}).loss.backward()
    kept = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "logging_steps": 2}
    arguments = arguments_for(tmp_path, **(kept | settings))
    trainer(model, arguments, train_dataset=rows, callbacks=[callback], **given).train()
    assert_recorded(callback.history, by_hand(model, rows))


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("resumed", "kept"), [(True, [2, 4]), (False, [])])
def test_an_attempt_that_was_broken_off_counts_up_to_where_the_next_begins(
    resumed: bool, kept: list[int], corpus: PreparedCorpus, tmp_path: Path
) -> None:
    rows = Rows(corpus)
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "logging_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    arguments = arguments_for(tmp_path, **settings)
    given: dict[str, Any] = {"args": arguments, "train_dataset": rows}
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, **given, callbacks=[callback, StopAfter(7)]).train()
    assert callback.steps == [2, 4, 6]
    Trainer(model, **given, callbacks=[callback]).train(resume_from_checkpoint=resumed or None)
    assert callback.steps == [*kept, *range(2 + len(kept) * 2, 13, 2)]
    assert_recorded(callback.history, by_hand(model, rows))
    before = len(callback.history)
    Trainer(model, **given, callbacks=[callback]).train()
    assert len(callback.history) == before + 6  # a training that ended is kept


def tiny_bert(is_decoder: bool) -> PreTrainedModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": 300}
    kind = transformers.BertLMHeadModel if is_decoder else transformers.BertForMaskedLM
    return kind(transformers.BertConfig(is_decoder=is_decoder, **shape))


def tiny_t5() -> PreTrainedModel:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=300, **shape))


@pytest.mark.parametrize("make", [lambda: tiny_bert(is_decoder=False), tiny_t5])
def test_a_model_whose_label_is_not_the_next_token_is_refused(
    make: Callable[[], PreTrainedModel],
) -> None:
    with pytest.raises(ValueError, match="does not predict the next token"):
        TokenMetricsCallback(make(), vocab_size=300)


def test_to_be_watched_changes_no_model() -> None:
    model = tiny_bert(is_decoder=True).train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    TokenMetricsCallback(model, vocab_size=300)
    assert [module.training for module in model.modules()] == modes


class Fused(torch.nn.Module):
    """A head that gives no logits, as TRL's trainers have it."""

    def __init__(self, model: PreTrainedModel, hits: bool) -> None:
        super().__init__()
        self.model, self.config, self.hits = model, model.config, hits
        self.device, self.dtype = model.device, model.dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Any, labels: Any = None, **rest: Any) -> Any:
        logits = self.model(input_ids=input_ids).logits
        if labels is None:
            return SimpleNamespace(logits=logits)
        logits, aim = logits[:, :-1], labels[:, 1:]
        mask = aim != -100
        log_probs = logits.log_softmax(-1).gather(-1, aim.clamp(min=0)[..., None])[..., 0] * mask
        hits = (logits.argmax(-1) == aim) & mask
        loss = -log_probs.sum() / mask.sum()
        return FusedOutput(loss, log_probs, hits if self.hits else None, mask)


@dataclass
class FusedOutput(ModelOutput):
    loss: Any = None
    log_probs: Any = None
    is_top1: Any = None
    label_mask: Any = None


@pytest.mark.parametrize("hits", [True, False])
def test_log_probabilities_do_in_place_of_logits(
    hits: bool, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """Without hits there is no accuracy to record: one line, and training goes on."""
    rows = Rows(corpus)
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    fused = Fused(model, hits)
    callback = TokenMetricsCallback(fused, vocab_size=corpus.vocab_size)
    arguments = arguments_for(tmp_path, learning_rate=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Trainer(fused, arguments, train_dataset=rows, callbacks=[callback]).train()
    lines = [str(one.message) for one in told if "TokenMetricsCallback" in str(one.message)]
    if hits:
        assert lines == []
        assert_recorded(callback.history, by_hand(model, rows))
    else:
        assert len(lines) == 1
        assert "neither logits nor log_probs and is_top1" in lines[0]
        assert callback.history == []


class Sliced(Trainer):
    """Trains on a part of each sequence that it cuts off itself."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        ids = inputs["input_ids"][:, :9]
        return own_loss(model(input_ids=ids), ids)


def test_training_goes_on_where_nothing_can_be_recorded(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    callback = TokenMetricsCallback(model, vocab_size=corpus.vocab_size)
    trainer = Sliced(
        model, arguments_for(tmp_path), train_dataset=Rows(corpus), callbacks=[callback]
    )
    with pytest.warns(UserWarning, match="records less: a pass had no labels"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert callback.history == []


def test_tokens_beyond_the_vocabulary_are_told_of(corpus: PreparedCorpus, tmp_path: Path) -> None:
    rows = Rows(corpus)
    model = build_model("qwen2-tiny", vocab_size=corpus.vocab_size)
    callback = TokenMetricsCallback(model, vocab_size=200)
    trainer = Trainer(
        model, arguments_for(tmp_path, learning_rate=0.0), train_dataset=rows, callbacks=[callback]
    )
    expected = by_hand(model, rows).count
    with pytest.warns(UserWarning, match=f"{int(expected[200:].sum())} next tokens are beyond"):
        trainer.train()
    assert callback.history[0].count.tolist() == expected[:200].tolist()
