"""Is what a GPU computes right: the loss head, the metrics and training, against the CPU's."""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.language import run_steps, zipf_corpus
from benchmarks.gpu.parts import Record, Settings, temporary_attempt
from frequency_bins import ClassMetrics
from llm_experiments.configs import RunConfig
from llm_experiments.models.loss_head import linear_cross_entropy
from llm_experiments.training.loop import HALF, token_losses, train

Results = dict[str, Tensor]


def checks_of_the_parts(settings: Settings, record: Record) -> None:
    """The loss head and the metrics, each by itself."""
    device = settings.device
    generator = torch.Generator().manual_seed(0)
    shape = settings.head_tokens, 128
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(settings.vocab_size, 128, generator=generator, dtype=torch.float64)
    weight = (weight / 8).to(device)
    targets = torch.randint(settings.vocab_size, shape[:1], generator=generator).to(device)
    targets[::7] = -100
    exact = head_results(features, weight, targets, ours=False)
    for precision, half in HALF.items():
        narrow = features.to(half or torch.float32), weight.float(), targets
        plain, mine = (head_results(*narrow, ours=ours) for ours in (False, True))
        check_errors(record, f"head {precision}", exact, plain, mine)
    check_metrics(settings, record)


def check_errors(record: Record, name: str, exact: Results, plain: Results, ours: Results) -> None:
    """Our error is at most 1.1 times that of the plain path in the same precision."""
    for what, wanted in exact.items():
        limit = 1.1 * distance(plain[what], wanted) + 1e-6
        record.check(f"{name}, {what}: error", distance(ours[what], wanted), limit)


def distance(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.double() - wanted).norm() / wanted.norm())


def head_results(features: Tensor, weight: Tensor, targets: Tensor, *, ours: bool) -> Results:
    """Losses and both gradients of the mean loss, scaled as fp16 needs it."""
    features, weight = features.clone().requires_grad_(), weight.clone().requires_grad_()
    share = torch.full(targets.shape, 1024.0 / len(targets), device=features.device)
    if ours:
        result = linear_cross_entropy(features, weight, targets, share)
        losses, objective = result.loss, result.objective
    else:
        losses = plain_losses(F.linear(features, weight.to(features.dtype)), targets)
        objective = (losses * share).sum()
    objective.backward()
    gradients = {"features": features.grad, "classifier": weight.grad}
    return {"losses": losses.detach()} | {f"gradient of {k}": g for k, g in gradients.items()}


def plain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's cross-entropy of each target, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)


def check_metrics(settings: Settings, record: Record) -> None:
    """ClassMetrics on the device against the CPU's."""
    generator = torch.Generator().manual_seed(1)
    on_cpu, there = (ClassMetrics(1000, place) for place in ("cpu", settings.device))
    for _ in range(3):
        loss = 10 * torch.rand(20_000, generator=generator)
        target = (1000 * torch.rand(20_000, generator=generator) ** 3).long()
        target[::9] = -100
        correct = torch.rand(20_000, generator=generator) < 0.3
        for metrics in (on_cpu, there):
            metrics.update(*(batch.to(metrics.device) for batch in (loss, target, correct)))
    expected, found = on_cpu.state_dict(), there.state_dict()
    for name in ("count", "correct"):
        wrong = (found[name].cpu() != expected[name]).sum()
        record.check(f"class metrics, {name}: classes that differ from the CPU's", int(wrong), 0)
    error = distance(found["loss_sum"].cpu(), expected["loss_sum"])
    record.check("class metrics, loss: error", error, 1e-12)


def checks_of_training(settings: Settings, record: Record) -> None:
    """Tiny models trained by `train`: the device against the CPU, half precision against fp32."""
    device = settings.device
    corpus = zipf_corpus(settings.tiny_vocab, 64, 32)
    config = RunConfig(steps=30, batch_size=8, evaluate_every=10, learning_rate=3e-3)
    model, on_cpu = trained(config, corpus, torch.device("cpu"))
    for precision in HALF:
        _, losses = trained(replace(config, precision=precision), corpus, device)
        error = abs(losses - on_cpu).mean()
        limit = 1e-3 if precision == "fp32" else 5e-2
        record.check(f"trained in {precision}: token losses off the CPU's fp32, nats", error, limit)
    model = model.to(device)
    exact = step_results(copy.deepcopy(model).double(), corpus, None, ours=False)
    for precision, half in HALF.items():
        plain, mine = (step_results(model, corpus, half, ours=ours) for ours in (False, True))
        check_errors(record, f"step in {precision}", exact, plain, mine)
    for precision in ("bf16", "fp16"):
        calls = host_waits(replace(config, precision=precision), corpus, device)
        record.check(f"step in {precision}: times that the host waits", len(calls), 0)
        if calls:
            record.figure(f"step in {precision}: calls that waited", "; ".join(calls))


def trained(config: RunConfig, corpus: Any, device: torch.device) -> tuple[Any, np.ndarray]:
    """A whole run: its model, and the final loss of each class that occurs."""
    with temporary_attempt(asdict(config)) as mine:
        model = train(config, corpus, mine, device=device)
        losses = mine.run.classes()["final_loss"].values
    return model, losses[corpus.class_counts.numpy() > 0]


def step_results(model: Any, corpus: Any, half: torch.dtype | None, *, ours: bool) -> Results:
    """Token losses of a batch and the gradient of their mean, through our path or torch's own."""
    sequences = torch.from_numpy(corpus.tokens[:8].astype(np.int64)).to(model.device)
    scale = 1024.0
    if ours:
        weights = torch.full((corpus.vocab_size,), scale, device=model.device, dtype=torch.float64)
        result, _ = token_losses(model, sequences, weights, half)
        losses, objective = result.loss, result.objective
    else:
        with torch.autocast(model.device.type, half, enabled=half is not None):
            logits = model(input_ids=sequences, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = plain_losses(logits, sequences[:, 1:].flatten())
        objective = scale * losses.mean()
    model.zero_grad(set_to_none=True)
    objective.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {"losses": losses.detach(), "gradient": gradient}


def host_waits(config: RunConfig, corpus: Any, device: torch.device) -> list[str]:
    """The calls, file and line, for which the host waits in a step that logs nothing.

    Setting the mode warns, too, once a process, that it does "not yet detect all synchronizing
    operations" (torch/csrc/cuda/Module.cpp). That is no wait.
    """
    if device.type != "cuda":
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def watch(step: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if step == 4 else "default")

        run_steps(config, corpus, device, 5, watch)
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    return [f"{warning.filename}:{warning.lineno}" for warning in waits]
