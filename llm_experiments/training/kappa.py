"""kappa: by how much decoupled decay shrinks, in all, a weight that nothing pushes back.

Reads a run's config as its manifest has it, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from run_store.input_files import is_number

# What a config says that lacks the field: those that came later have it only where it differs.
_ABSENT = {"optimizer": "adamw", "decay_mode": "decoupled", "schedule": "cosine"}
# With these, decay is not one number for all weights and steps.
_ALL_ALIKE = {"decay_exponent": 0, "decay_until": 1}


def kappa(config: Mapping[str, Any]) -> float:
    """Weight decay times the sum over the steps of `optimization.learning_rate`.

    NaN where that is not what decay does (only AdamW's decoupled decay multiplies every weight by
    1 - learning rate * decay while the size of its gradients does not matter), and for a config
    without the numbers. Written as a sum in closed form: a cosine and a straight line from 1 to 0
    over m steps, the end left out, both come to (m + 1)/2.
    """
    known = _ABSENT | {name: value for name, value in config.items() if value is not None}
    names = ("weight_decay", "learning_rate", "warmup_steps", "steps")
    decoupled = (known["optimizer"], known["decay_mode"]) == ("adamw", "decoupled")
    alike = all(known.get(name, plain) == plain for name, plain in _ALL_ALIKE.items())
    if not (decoupled and alike) or not all(is_number(known.get(name)) for name in names):
        return math.nan
    try:
        decay, peak, warmup, steps = (float(known[name]) for name in names)
    except OverflowError:
        return math.nan
    climbing, rest = min(warmup, steps), max(0.0, steps - warmup)
    shares = {"cosine": (rest + 1) / 2, "linear": (rest + 1) / 2, "constant": rest}
    after = shares.get(str(known["schedule"]), math.nan) if rest else 0.0
    warming = climbing * (climbing - 1) / (2 * warmup) if warmup else 0.0
    total = decay * peak * (warming + after)
    return total if math.isfinite(total) else math.nan
