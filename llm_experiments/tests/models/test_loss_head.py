"""The fused head against torch's cross-entropy in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

from llm_experiments.models import loss_head
from llm_experiments.models.loss_head import (
    IGNORE_INDEX,
    held_bytes,
    largest_and_correct,
    linear_cross_entropy,
)
from llm_experiments.tests.live_memory import LiveMemory
from run_store.tests.fake_gpu import GPU, fake_gpu


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The head as it is on a CPU, and with a GPU's kernel, which an interpreter runs here."""
    if request.param == "triton":
        row_kernel = pytest.importorskip("llm_experiments.models.row_kernel")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton was to run on a GPU when it was imported")
        monkeypatch.setattr(loss_head, "_KERNEL", {"cpu"})
        monkeypatch.setattr(row_kernel, "_BLOCK", 512)
    return request.param


def case(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(37, 6, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(11, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (37,), generator=generator)
    targets[[0, 5, 36]] = IGNORE_INDEX
    token_weight = torch.rand(37, generator=generator, dtype=torch.float64)
    return features.to(dtype), weight.to(dtype), targets, token_weight


def small_numbers(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and a classifier of whole numbers; logits of at most 128, exact in bf16 too."""
    generator = torch.Generator().manual_seed(3)
    features, weight = (
        torch.randint(-4, 5, (number, 8), generator=generator) for number in (rows, classes)
    )
    return features.float(), weight.float()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("chunk_elements", [1, 11 * 5, 2**18])
def test_equals_torch_in_float64(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, multiple: int, smoothing: float
) -> None:
    """With label smoothing the objective is torch's, and the losses stay plain cross-entropies."""
    monkeypatch.setitem(loss_head._CHUNK_ELEMENTS, "cpu", chunk_elements)
    monkeypatch.setitem(loss_head._MULTIPLE, "cpu", multiple)
    monkeypatch.setattr(loss_head, "_LEAST_ROWS", 1)
    features, weight, targets, token_weight = case(torch.float64)
    ours = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [features.clone().requires_grad_(), weight.clone().requires_grad_()]

    losses = linear_cross_entropy(*ours, targets, token_weight, smoothing)
    (2.5 * losses.objective).backward()
    logits = theirs[0] @ theirs[1].T
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    smoothed = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    objective = (smoothed * token_weight).sum()
    (2.5 * objective).backward()

    torch.testing.assert_close(losses.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.objective, objective, rtol=1e-12, atol=0)
    assert torch.equal(losses.correct, logits.argmax(-1) == targets)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_float32_is_as_near_to_float64_as_torch_is() -> None:
    features, weight, targets, token_weight = case(torch.float64)
    exact = F.cross_entropy(features @ weight.T, targets, reduction="none")
    features, weight = features.float(), weight.float()
    plain = F.cross_entropy(features @ weight.T, targets, reduction="none")
    ours = linear_cross_entropy(features, weight, targets, token_weight).loss
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() + 1e-6


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_half_precision_is_as_near_to_float64_as_torch_is(
    way: str, dtype: torch.dtype, scale: float
) -> None:
    """Losses and both gradients, in fp16 under a loss scale, with weights kept in float32."""
    if way == "triton" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts off what a GPU rounds to bf16")
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(200, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(700, 32, generator=generator, dtype=torch.float64) / 4
    targets = torch.randint(700, (200,), generator=generator)
    share = torch.full((200,), scale / 200, dtype=torch.float64)

    def results(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        x = features.clone().to(dtype).requires_grad_()
        w = weight.clone().to(wide).requires_grad_()
        if ours:
            result = linear_cross_entropy(x, w, targets, share)
            losses, objective = result.loss, result.objective
        else:
            logits = (x @ w.to(dtype).T).to(wide)
            losses = F.cross_entropy(logits, targets, reduction="none")
            objective = (losses * share).sum()
        objective.backward()
        assert x.grad is not None
        assert w.grad is not None
        return [losses.detach(), x.grad, w.grad]

    exact = results(torch.float64, ours=False)
    mine, torchs = results(dtype, ours=True), results(dtype, ours=False)
    for found, plain, wanted in zip(mine, torchs, exact, strict=True):
        assert (found - wanted).norm() <= 1.1 * (plain - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none")
def test_equals_the_chunked_one_of_torch() -> None:
    features, weight, targets, _ = case(torch.float64)
    ours = linear_cross_entropy(features, weight, targets, torch.ones(37)).loss
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8, chunking_method=None)
    theirs = F.linear_cross_entropy(
        features, weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_large_logits_do_not_overflow() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    losses = linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([0, 1]), torch.ones(2))
    assert losses.loss.tolist() == [0.0, 2e4]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, [True, True, False]), (torch.bfloat16, [True, False, False])],
)
def test_of_equal_logits_the_first_is_the_prediction_in_half_precision(
    dtype: torch.dtype, expected: list[bool]
) -> None:
    weight = torch.tensor([[1.0], [1.0], [0.5]])
    losses = linear_cross_entropy(
        torch.ones(3, 1, dtype=dtype), weight, torch.tensor([0, 1, 2]), torch.ones(3)
    )
    assert losses.correct.tolist() == expected


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_correct_is_what_a_literal_argmax_says(dtype: torch.dtype) -> None:
    """Of whole numbers, whose products are exact in any order, and often equal."""
    features, weight = small_numbers(500, 50)
    logits = features @ weight.T
    first, last = logits.argmax(-1), 49 - logits.flip(-1).argmax(-1)
    assert (first != last).sum() > 15
    # A third of the targets are the first of the largest, a third the last; the rest are any.
    row = torch.arange(500)
    targets = torch.where(row % 3 == 0, first, torch.where(row % 3 == 1, last, row % 50))
    losses = linear_cross_entropy(features.to(dtype), weight, targets, torch.ones(500))
    if dtype is torch.float32:  # every one of equal logits is
        expected = logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1)
    else:
        expected = first == targets
    assert torch.equal(losses.correct, expected)


@pytest.mark.parametrize("first_of_equals", [True, False])
def test_a_target_below_the_largest_logit_is_no_prediction(first_of_equals: bool) -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0]] * 4])
    targets = torch.tensor([[[0], [1], [2], [3]]])
    largest, correct = largest_and_correct(logits, targets, first_of_equals=first_of_equals)
    assert largest.tolist() == [[[2.0]] * 4]
    assert correct.tolist() == [[[False], [True], [not first_of_equals], [False]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize(
    ("num_targets", "width"), [(200, 16), (20, 16), (200, 256)], ids=["forward", "few", "backward"]
)
def test_what_the_head_holds_is_what_is_planned(
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    num_targets: int,
    width: int,
    multiple: int,
    dtype: torch.dtype,
) -> None:
    """To the byte as V grows; beyond that, only the features that a test holds, and some a token.

    At a small width the chunk of logits makes the peak; at a large one the gradient, twice.
    """
    if way == "triton":
        if (num_targets, multiple, dtype) != (20, 64, torch.bfloat16):
            pytest.skip("for an interpreter one case is enough")
        monkeypatch.setattr("llm_experiments.models.row_kernel._BLOCK", 8192)
    monkeypatch.setitem(loss_head._MULTIPLE, "cpu", multiple)
    monkeypatch.setitem(loss_head._CHUNK_ELEMENTS, "cpu", 2**18)  # two chunks of the 200

    def measured(num_classes: int) -> int:
        features = torch.randn(num_targets, width).to(dtype).requires_grad_()
        weight = torch.randn(num_classes, width).to(torch.promote_types(dtype, torch.float32))
        targets = torch.arange(num_targets)
        share = torch.ones(num_targets)
        with LiveMemory(features, weight) as memory:
            losses = linear_cross_entropy(features, weight.requires_grad_(), targets, share)
            losses.objective.backward()
        return memory.peak - weight.nbytes

    def planned(num_classes: int) -> int:
        return held_bytes(num_targets, num_classes, width, dtype, "cpu")

    growth = measured(7001) - measured(3000) - (planned(7001) - planned(3000))
    assert abs(growth) <= (1024 if way == "triton" else 0)  # the interpreter has tensors of its own
    beyond = measured(3000) - planned(3000)
    assert 0 <= beyond <= num_targets * (width * dtype.itemsize + 64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
def test_a_gpu_gives_what_a_cpu_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """There the classifier is padded, and a chunk is larger; the gradients are the saved ones.

    The logits are exact; the sums of the gradients, of about 1, are rounded in some order.
    """
    features, weight = small_numbers(40, 37)
    features = features.to(dtype).requires_grad_()
    weight = (weight / 8).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    targets = (torch.arange(40) % 37).masked_fill_(torch.arange(40) % 7 == 0, IGNORE_INDEX)
    token_weight = torch.linspace(0.1, 1, 40)

    def results(device: torch.device) -> list[torch.Tensor]:
        parts = [part.to(device) for part in (features, weight, targets, token_weight)]
        losses = linear_cross_entropy(*parts, label_smoothing=0.1)
        assert losses.objective.grad_fn is not None
        found = [*losses, *losses.objective.grad_fn.saved_tensors]  # type: ignore[attr-defined]
        assert {part.device.type for part in found} == {device.type}
        return [part.detach().cpu() for part in found]

    monkeypatch.setattr(loss_head, "_KERNEL", set())  # a fake GPU has no kernels
    with fake_gpu():
        there = results(GPU)
    for one, other in zip(there, results(torch.device("cpu")), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [4, 8, 64])
def test_the_kernel_gives_what_torch_gives_in_float64(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    dtype: torch.dtype,
    smoothing: float,
    gradient: bool,
) -> None:
    """Of the same logits, some of them equal and some infinite, in blocks that do not divide them.

    What is padded has no part in it, and its gradient is 0.
    """
    row_kernel = pytest.importorskip("llm_experiments.models.row_kernel")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was to run on a GPU when it was imported")
    monkeypatch.setattr(row_kernel, "_BLOCK", block)
    generator = torch.Generator().manual_seed(4)
    logits = 4 * torch.randn(40, 16, generator=generator)
    logits[:10] = logits[:10].round()
    logits[30:, :9] = -torch.inf
    target = torch.randint(9, 13, (40,), generator=generator)
    scale = torch.rand(40, generator=generator)
    if smoothing:
        logits = logits.clamp(min=-50)
    logits[:, 13:] = 100.0
    logits = logits.to(dtype)
    exact = logits[:, :13].double().requires_grad_()
    losses = F.cross_entropy(exact, target, reduction="none")
    smoothed = F.cross_entropy(exact, target, reduction="none", label_smoothing=smoothing)
    (smoothed * scale).sum().backward()
    assert exact.grad is not None
    first = dtype is not torch.float32
    hits = largest_and_correct(exact.detach(), target[:, None], first_of_equals=first)[1][:, 0]
    ours = row_kernel.cross_entropy(logits, target, scale, smoothing, 13, gradient=gradient)
    torch.testing.assert_close(ours[0].double(), losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), smoothed.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[2], hits)
    if gradient:
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(
            ours[3][:, :13].double(), exact.grad, rtol=rounding, atol=rounding * 1e-3 + 1e-7
        )
        assert not ours[3][:, 13:].any()
