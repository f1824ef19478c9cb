"""The order in which a training meets its samples: a function of the settings alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from ufm.training.settings import TableTraining

_STEPS_AT_ONCE = 1024


def sample_chunks(training: TableTraining) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Contexts, their classes and the labels of the next steps, each (steps, batch_size)."""
    generator = training.generator(of_weights=False)
    seen, waiting = 0, torch.empty(2, 0, dtype=torch.int64)
    for first in range(0, training.steps, _STEPS_AT_ONCE):
        steps = min(_STEPS_AT_ONCE, training.steps - first)
        needed = steps * training.batch_size
        missing = max(0, needed - waiting.shape[1])
        passes = -(-missing // int(training.counts.sum()))
        samples = _passes(training, seen, seen + passes, generator)
        joined = torch.cat([waiting, samples], dim=1)
        contexts, classes = joined[:, :needed].reshape(2, steps, training.batch_size)
        seen, waiting = seen + passes, joined[:, needed:]
        yield contexts, classes, _labels(training, classes, generator)


def _passes(
    training: TableTraining, first: int, last: int, generator: torch.Generator
) -> Int[Tensor, "2 samples"]:
    """The passes from `first` to before `last`, each shuffled: context of each sample, class."""
    counts, contexts = training.counts, training.contexts_of_class
    classes = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes]
    passes = torch.arange(first, last).unsqueeze(1)
    turn = (number + passes * counts[classes]) % contexts[classes]
    rows = (contexts.cumsum(0) - contexts)[classes] + turn
    order = torch.rand(rows.shape, generator=generator, dtype=torch.float64).argsort(dim=1)
    both = torch.stack([rows, classes.expand_as(rows)])
    return both.gather(2, order.expand_as(both)).flatten(1)


def _labels(training: TableTraining, classes: Tensor, generator: torch.Generator) -> Tensor:
    if training.label_noise == 0.0:
        return classes
    redrawn = torch.rand(classes.shape, generator=generator) < training.label_noise
    drawn = torch.randint(len(training.counts), classes.shape, generator=generator)
    return torch.where(redrawn, drawn, classes)


def batches_with(classes: Int[Tensor, "steps batch"], num_classes: int) -> Int[Tensor, " V"]:
    """Of these batches, how many hold each class."""
    step = torch.arange(len(classes)).unsqueeze(1)
    met = torch.zeros(len(classes) * num_classes, dtype=torch.bool)
    met[step * num_classes + classes] = True
    return met.view(-1, num_classes).sum(0)
