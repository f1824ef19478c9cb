from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "theory",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("theory")
torch.set_num_threads(1)
