from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ufm.training import TableTraining, train_table
from ufm.training.samples import batches_with, sample_chunks

SMALL = {"class_counts": (7, 4, 2), "contexts": 2, "width": 5, "batch_size": 6}


def softmax(logits):
    powers = [math.exp(z - max(logits)) for z in logits]
    return [power / sum(powers) for power in powers]


def batch_gradients(table, W, batch, kind):
    """Of the mean cross-entropy, sample by sample and entry by entry."""
    d = table.shape[1]
    g_table, g_W = np.zeros_like(table), np.zeros_like(W)
    for context, label in batch:
        row = table[context]
        length = math.sqrt(sum(x * x for x in row))
        h = row * math.sqrt(d) / length if kind == "normalized" else row
        pushed = softmax([sum(w[j] * h[j] for j in range(d)) for w in W])
        pushed[label] -= 1.0
        g_h = np.zeros(d)
        for k in range(len(W)):
            for j in range(d):
                g_W[k, j] += pushed[k] * h[j] / len(batch)
                g_h[j] += pushed[k] * W[k, j] / len(batch)
        if kind == "normalized":
            along = sum(g_h * row) / length**2
            g_h = math.sqrt(d) / length * (g_h - along * row)
        g_table[context] += g_h
    return g_table, g_W


def literal_training(training, weight_decay, batches):
    """Each optimiser as it is printed: Kingma & Ba 2015, Loshchilov & Hutter 2019."""
    generator = training.generator(of_weights=True)
    rows = int(training.contexts_of_class.sum()), len(training.counts)
    drawn = [torch.randn(n, training.width, generator=generator, dtype=torch.float64) for n in rows]
    weights = [training.start_size * values.numpy() for values in drawn]
    if training.feature_kind == "nonnegative":
        weights[0] = np.abs(weights[0])
    m, v = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for t, batch in enumerate(batches):
        rate = training.learning_rate
        if training.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * t / training.steps)) / 2
        gradients = batch_gradients(*weights, batch, training.feature_kind)
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            if training.optimizer == "sgd":
                weights[i] = w - rate * (g + weight_decay * w)
                continue
            if training.optimizer == "adam":
                g = g + weight_decay * w
            else:
                w = w * (1 - rate * weight_decay)
            m[i] = training.beta1 * m[i] + (1 - training.beta1) * g
            v[i] = training.beta2 * v[i] + (1 - training.beta2) * g * g
            m_hat = m[i] / (1 - training.beta1 ** (t + 1))
            v_hat = v[i] / (1 - training.beta2 ** (t + 1))
            weights[i] = w - rate * m_hat / (np.sqrt(v_hat) + training.epsilon)
        if training.feature_kind == "nonnegative":
            weights[0] = np.maximum(weights[0], 0.0)
    return weights


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("features", ["nonnegative", "free", "normalized"])
def test_three_steps_are_those_of_a_literal_loop(optimizer, features):
    training = TableTraining(
        **SMALL, optimizer=optimizer, features=features, steps=3, label_noise=0.3,
        schedule="cosine" if features == "free" else "constant", learning_rate=0.05,
        beta1=0.8, beta2=0.9, epsilon=1e-3, initial_size=0.4, seed=3,
    )  # fmt: skip
    ((contexts, _, labels),) = sample_chunks(training)
    batches = [
        list(zip(*pair, strict=True))
        for pair in zip(contexts.tolist(), labels.tolist(), strict=True)
    ]
    table, W = literal_training(training, 0.7, batches)
    trained = train_table(training, weight_decay=0.7)
    if features == "normalized":
        table = table * math.sqrt(5) / np.sqrt((table**2).sum(1, keepdims=True))
    # Some 1e3 operations on numbers of order 1.
    np.testing.assert_allclose(trained.W, W, rtol=0, atol=1e-12)
    np.testing.assert_allclose(trained.features, table, rtol=0, atol=1e-12)


def test_losses_and_margins_are_those_of_the_weights():
    training = TableTraining(**SMALL, steps=5, label_noise=0.2, features="free", seed=1)
    trained = train_table(training, weight_decay=0.1)
    rows = iter(trained.features.tolist())
    for k in range(3):
        losses, margins = [], []
        for _ in range(2):
            h = next(rows)
            z = [sum(w * x for w, x in zip(row, h, strict=True)) for row in trained.W.tolist()]
            p = softmax(z)
            target = [0.2 / 3 + 0.8 * (j == k) for j in range(3)]
            losses.append(-sum(q * math.log(c) for q, c in zip(target, p, strict=True)))
            others = sum(math.exp(z[j]) for j in range(3) if j != k) / 2
            margins.append(z[k] - math.log(others))
        assert float(trained.loss[k]) == pytest.approx(sum(losses) / 2, rel=1e-12)
        assert float(trained.margin[k]) == pytest.approx(sum(margins) / 2, rel=1e-11, abs=1e-12)


def test_every_pass_holds_every_sample_and_contexts_take_turns():
    training = TableTraining(
        class_counts=(7, 4, 2), contexts=3, batch_size=13, steps=2600, label_noise=0.4, seed=5
    )
    chunks = list(sample_chunks(training))
    contexts, classes, labels = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert contexts.shape == (2600, 13)
    for one_pass in classes:
        assert torch.bincount(one_pass).tolist() == [7, 4, 2]
    assert training.contexts_of_class.tolist() == [3, 3, 2]
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    assert torch.equal(owner[contexts], classes)
    seen = torch.bincount(contexts.flatten(), minlength=8)
    for first, last, total in ((0, 3, 7), (3, 6, 4), (6, 8, 2)):
        share = 2600 * total / (last - first)
        assert float((seen[first:last] - share).abs().max()) < 1.0
    assert len({tuple(one_pass) for one_pass in classes[:50].tolist()}) > 45
    # Binomial: 33800 draws, 0.4 * 2/3 of which change the label; five standard deviations.
    changed = float((labels != classes).double().mean())
    assert changed == pytest.approx(0.4 * 2 / 3, abs=5 * math.sqrt(0.2 / 33800))


def test_batches_with_a_class_are_counted():
    training = TableTraining(class_counts=(40, 3, 1), batch_size=5, steps=37)
    ((_, classes, _),) = sample_chunks(training)
    literal = [sum(k in batch for batch in classes.tolist()) for k in range(3)]
    assert batches_with(classes, 3).tolist() == literal
    assert train_table(training, weight_decay=0.1).batches.tolist() == literal


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("contexts", "exponent"), [(1, 0.0), (2, 0.5)])
def test_l2_ends_at_the_closed_form(optimizer, contexts, exponent):
    counts = (64, 36, 16, 9, 4)
    training = TableTraining(
        class_counts=counts, contexts=contexts, context_exponent=exponent,
        optimizer=optimizer, steps=4_000, width=20,
    )  # fmt: skip
    decay, N, V = 5e-3, sum(counts), len(counts)
    trained = train_table(training, weight_decay=decay)
    for k, n in enumerate(counts):
        rows = round(contexts * n**exponent)
        exact = -math.log(1 - decay * math.sqrt((V - 1) / V) * N * math.sqrt(rows) / n)
        assert float(trained.loss[k]) == pytest.approx(exact, rel=1e-2)


def test_the_same_seed_gives_the_same_bits():
    training = TableTraining(**SMALL, steps=50, optimizer="adamw")
    one, two = (train_table(training, weight_decay=0.1) for _ in range(2))
    assert torch.equal(one.W, two.W)
    assert torch.equal(one.features, two.features)
    other = TableTraining(**SMALL, steps=50, optimizer="adamw", seed=1)
    assert not torch.equal(one.W, train_table(other, weight_decay=0.1).W)


def test_a_run_takes_the_first_steps_of_a_longer_one():
    longer, shorter = (
        TableTraining(**SMALL, steps=steps, schedule="constant") for steps in (1500, 1100)
    )
    first = next(iter(sample_chunks(longer)))[1]
    assert torch.equal(first, next(iter(sample_chunks(shorter)))[1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"width": 0}, "width is 0"),
        ({"contexts": 0}, "contexts is 0"),
        ({"context_exponent": 1.5}, "context_exponent is 1.5"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"features": "tanh"}, "features is 'tanh'"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"initial_size": math.inf}, "initial_size is inf"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"class_counts": (5,)}, "at least two classes"),
        ({"class_counts": (5, 0)}, "holds 0"),
    ],
)
def test_bad_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        TableTraining(**({"class_counts": (5, 2)} | changes))


@pytest.mark.parametrize("decay", [math.nan, -0.1, math.inf])
def test_bad_decays_are_named(decay):
    with pytest.raises(ValueError, match=f"weight_decay is {decay}"):
        train_table(TableTraining(**SMALL, steps=1), weight_decay=decay)


def test_a_training_that_diverges_is_named():
    training = TableTraining(**SMALL, steps=2000, learning_rate=1e6, schedule="constant")
    with pytest.raises(ValueError, match="diverged at learning_rate 1000000"):
        train_table(training, weight_decay=1.0)


def test_a_table_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="too large to allocate"):
        train_table(TableTraining(class_counts=(5, 2), width=10**12), weight_decay=0.1)
