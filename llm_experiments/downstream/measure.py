"""One model on the tasks: a pass over the reviews, ranks of tokens and words, a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_experiments.downstream.items import Counts, Review
from llm_experiments.downstream.results import Downstream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_LOGITS = 2**24
_PENALTIES = tuple(10.0**power for power in range(-4, 2))
_FOLDS = 5


def measure(
    model: PreTrainedModel,
    counts: Counts,
    train: tuple[Sequence[Review], np.ndarray],
    test: tuple[Sequence[Review], np.ndarray],
    report: Callable[[int], None] = lambda done: None,
) -> Downstream:
    """Sentiment, cloze and loss of a model on the test reviews; see `Downstream`.

    train, test: sequences and their classes, 0 or 1. Sentiment is told by a logistic regression of
    the mean over a review of the model's last features, standardised; its L2 penalty is the best
    of five folds of the training reviews. `report` is told how many reviews are done.

    Raises ValueError for fewer training reviews of a class than there are folds, and for tokens
    that the counts or the model do not have.
    """
    (learned, classes), (tested, truth) = train, test
    if len(counts.tokens) > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{len(counts.tokens)} tokens are counted, the model has fewer")
    if (fewest := np.bincount(classes, minlength=2).min()) < _FOLDS:
        raise ValueError(
            f"{fewest} training reviews of one sentiment; expected at least {_FOLDS}, which choose "
            "the penalty: more --reviews"
        )
    done = 0
    features = np.zeros((len(learned) + len(tested), model.config.hidden_size))
    ranks: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(tested)
    losses: list[np.ndarray] = [np.zeros(0)] * len(tested)
    for places, hidden, logits, ids in _passes(model, [*learned, *tested]):
        for row, place in enumerate(places):
            length = len(ids[row])
            features[place] = hidden[row, :length].double().mean(dim=0).cpu().numpy()
            if place >= len(learned):
                found = _ranks(logits[row, : length - 1], ids[row][1:].to(logits.device))
                ranks[place - len(learned)], losses[place - len(learned)] = found
        report(done := done + len(places))
    correct = _classified(features[: len(learned)], classes, features[len(learned) :]) == truth
    ids_of = [sequence.ids for sequence in tested]
    targets = np.concatenate([ids[1:] for ids in ids_of])
    review = np.repeat(np.arange(len(tested)), [len(ids) - 1 for ids in ids_of])
    seen = np.maximum(counts.tokens, 1)
    words = [(n, *word) for n, sequence in enumerate(tested) for word in sequence.words]
    return Downstream(
        sentiment_correct=correct.astype(np.uint8),
        sentiment_rarity=np.array([np.log(seen[ids]).mean() for ids in ids_of], dtype=np.float32),
        token_review=review.astype(np.int32),
        token_count=counts.tokens[targets],
        token_rank=np.concatenate(ranks).astype(np.int32),
        token_loss=np.concatenate(losses).astype(np.float32),
        word_review=np.array([n for n, _, _ in words], dtype=np.int32),
        word_count=np.array(
            [counts.words[tuple(ids_of[n][begin:end].tolist())] for n, begin, end in words],
            dtype=np.int64,
        ),
        # Rank t is that of token t + 1; the word's first token is given.
        word_rank=np.array(
            [ranks[n][begin : end - 1].max() for n, begin, end in words], dtype=np.int32
        ),
    )


def _ranks(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rank (1 for the largest logit) and loss of targets (T,) by logits (T, V)."""
    logits = logits.float()
    of_target = logits.gather(1, targets[:, None])
    ranks = 1 + (logits > of_target).sum(dim=1)
    losses = logits.logsumexp(dim=1) - of_target[:, 0]
    return ranks.cpu().numpy(), losses.cpu().numpy()


@torch.no_grad()
def _passes(
    model: PreTrainedModel, sequences: Sequence[Review]
) -> Iterator[tuple[list[int], Tensor, Tensor, list[Tensor]]]:
    """Batches: places, last features (B, T, D), logits (B, T, V), ids; long sequences first."""
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(
        lambda module, given, output: kept.append(output.last_hidden_state)
    )
    most = max(1, _MOST_LOGITS // model.get_input_embeddings().num_embeddings)
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place].ids))
    try:
        while order:
            number = max(1, most // len(sequences[order[0]].ids))
            places, order = order[:number], order[number:]
            ids = [torch.from_numpy(sequences[place].ids) for place in places]
            batch = pad_sequence(ids, batch_first=True, padding_value=0)
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            logits = model(
                input_ids=batch.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
            ).logits
            yield places, kept.pop(), logits, ids
    finally:
        hook.remove()


def _classified(features: np.ndarray, classes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The classes of other features by a logistic regression on features (R, D)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(
        regression,
        {"logisticregression__C": _PENALTIES},
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=0),
    )
    return np.asarray(search.fit(features, classes).predict(others))
