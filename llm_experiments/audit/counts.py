"""Training counts from a file that anyone may have written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from run_store.input_files import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_BYTES = 2**28
_KEYS = ("id", "token", "text")
_COUNTS = ("count", "training_count", "counts", "class_count")


def read_counts(path: Path, tokenizer: PreTrainedTokenizerBase, num_classes: int) -> Tensor:
    """(V,) int64 from CSV or TSV with a header, or from JSON.

    A column ``count`` beside ``id``, ``token`` (the vocabulary's name) or ``text``, the first of
    them that is there; JSON: a list by id, or an object of id, token or text to count. Every token
    of a text gets the text's count. Ids that are not named have the count 0, and what is named
    twice the sum.

    Raises:
        ValueError: naming file and entry: no such columns, an id or token that the tokenizer does
            not have, a count that is no whole number, or none above 0.
    """
    content = read_file(path, most_bytes=_MOST_BYTES)
    try:
        text = content.decode("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        key, pairs = _json_pairs(text) if is_json else _table_pairs(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} holds no counts: {error}") from None
    counts = torch.zeros(num_classes, dtype=torch.int64)
    vocabulary = tokenizer.get_vocab()
    for name, value in pairs:
        if not (number := str(value).strip()).isdecimal() or len(number) > 15:
            raise ValueError(
                f"{path}: the count of {name!r:.80} is {value!r:.80}; expected a whole number in "
                "digits alone"
            )
        if key == "text":
            ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        elif key == "token" or (key is None and not name.isdecimal()):
            ids = [vocabulary[name]] if name in vocabulary else []
        else:
            ids = [int(name)] if name.strip().isdecimal() else []
        if not ids or max(ids) >= num_classes:
            raise ValueError(f"{path}: {name!r:.80} is no {key or 'id or token'} of the model")
        for token_id in ids:
            counts[token_id] += int(number)
    if not bool(counts.any()):
        raise ValueError(f"{path} holds no count above 0; expected at least one")
    return counts


def _json_pairs(text: str) -> tuple[str | None, Iterable[tuple[str, object]]]:
    data = json.loads(text)
    if isinstance(data, list):
        return "id", [(str(place), value) for place, value in enumerate(data)]
    if not isinstance(data, dict):
        raise ValueError(f"a {type(data).__name__}; expected a list or an object")
    return None, list(data.items())


def _table_pairs(text: str) -> tuple[str, Iterable[tuple[str, object]]]:
    line = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in line else ",")
    names = {name.strip().lower(): name for name in rows.fieldnames or ()}
    key = next((name for name in _KEYS if name in names), None)
    count = next((names[name] for name in _COUNTS if name in names), None)
    if key is None or count is None:
        raise ValueError(
            f"its header is {line.strip()!r:.80}; expected count, and id, token or text"
        )
    return key, [(row[names[key]] or "", row[count]) for row in rows]
