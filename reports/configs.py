"""What a report relies on in the config of a run, which anyone may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from run_store.input_files import is_integer, is_number

_MOST_SEED = 2**63  # as an array of seeds holds them
_TEXTS = ("model", "corpus", "dataset", "decay")
_COUNTS = ("batch_size", "accumulation")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, for a value that is not of its kind.

    Every run has a `weight_decay` and a `seed`; all else may be absent or null.
    """
    if not (is_number(config.get("weight_decay")) and is_integer(config.get("seed"))):
        raise ValueError("its config has no weight_decay and seed")
    if abs(config["seed"]) >= _MOST_SEED:
        raise ValueError(f"its config has the seed {config['seed']}; expected one of 64 bits")
    given = {name: value for name, value in config.items() if value is not None}
    for name in _TEXTS:
        if not isinstance(given.get(name, ""), str):
            raise _wrong(name, given, "a text")
    for name in _COUNTS:
        if not is_integer(given.get(name, 1)):
            raise _wrong(name, given, "an integer")
    if not is_number(given.get("loss_weight_exponent", 0)):
        raise _wrong("loss_weight_exponent", given, "a number")
    counts = given.get("class_counts", [])
    if not (isinstance(counts, list) and all(map(is_integer, counts))):
        raise _wrong("class_counts", given, "a list of integers")


def _wrong(name: str, config: Mapping[str, Any], expected: str) -> ValueError:
    return ValueError(f"its config has {name} {config[name]!r:.100}; expected {expected}")
