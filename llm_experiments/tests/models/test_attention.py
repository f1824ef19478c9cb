"""Grouped attention against a loop over queries, torch's kernel and transformers' Qwen2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_experiments.models import attention
from llm_experiments.models.presets import build_model, features
from run_store.tests.fake_gpu import GPU, fake_gpu


def inputs(heads: int, kv_heads: int, length: int, width: int, **options: object) -> list[Tensor]:
    """q, k, v as a model has them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(heads * length)
    return [
        torch.randn(2, length, number, width, generator=generator, dtype=torch.float64)
        .to(**options)  # type: ignore[call-overload]
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    ]


def by_a_loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query by query: head h looks into key-value head h // (Q / K), at itself and before."""
    batch, heads, length, width = q.shape
    rows = []
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, length))):
        group = h // (heads // k.shape[1])
        weights = (k[b, group, : t + 1] @ q[b, h, t] / width**0.5).exp()
        rows.append(weights @ v[b, group, : t + 1] / weights.sum())
    return torch.stack(rows).view(batch, heads, length, width)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 1, 9), (6, 2, 16), (4, 4, 5)])
def test_grouped_attention_is_attention(heads: int, kv_heads: int, length: int) -> None:
    q, k, v = inputs(heads, kv_heads, length, 8)
    upstream = torch.randn_like(q)
    results = []
    for path in (attention.grouped_attention, by_a_loop):
        mixed = path(q, k, v)
        results.append([mixed, *torch.autograd.grad(mixed, (q, k, v), upstream)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_in_single_precision_it_errs_no_more_than_torch() -> None:
    exact = inputs(4, 1, 64, 32)
    single = [x.detach().float() for x in exact]
    expected = by_a_loop(*exact)
    error = (attention.grouped_attention(*single) - expected).abs().max()
    repeated = (x.repeat_interleave(4, dim=1) for x in single[1:])
    torchs = F.scaled_dot_product_attention(single[0], *repeated, is_causal=True)
    assert error <= (torchs - expected).abs().max() + 1e-6


@pytest.mark.parametrize(
    ("dtype", "masked", "shared"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_a_gpu_repeats_no_keys_where_its_kernels_do_without(
    dtype: torch.dtype, masked: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, options = F.scaled_dot_product_attention, []

    def recorded(*arguments: Tensor, **given: Any) -> Tensor:
        options.append(given["enable_gqa"])
        return stock(*arguments, **given)

    exact = inputs(6, 2, 16, 8)
    mask = torch.ones(16, 16, dtype=torch.bool).tril() if masked else None
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with fake_gpu(), torch.no_grad():
        q, k, v = (x.to(dtype).to(GPU) for x in exact)
        mixed = attention.attention(q, k, v, mask if mask is None else mask.to(GPU)).cpu()
    assert options == [shared]
    rounding = 4 * torch.finfo(dtype).eps  # of the inputs, the weights and the result
    torch.testing.assert_close(mixed.double(), by_a_loop(*exact), atol=rounding, rtol=rounding)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "options", "expected"),
    [
        (4, 1, 16, {}, True),
        (4, 1, 17, {}, False),
        (4, 4, 16, {}, False),
        (4, 1, 16, {"dtype": torch.bfloat16}, False),
        (4, 1, 16, {"device": "meta"}, False),
    ],
)
def test_it_is_chosen_where_it_pays(
    heads: int, kv_heads: int, length: int, options: dict[str, object], expected: bool
) -> None:
    q, k, _ = inputs(heads, kv_heads, length, 8, **options)
    assert attention.grouped_pays(q, k) is expected
    # A query that looks back on a cache has more keys than queries.
    assert not attention.grouped_pays(q[:, :, -1:], k)


@pytest.mark.parametrize("length", [16, 64, 65])
def test_qwen2_computes_what_it_does_with_transformers_attention(length: int) -> None:
    model = build_model("qwen2-tiny", vocab_size=64, dtype=torch.float64)
    ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(0))
    results = []
    for name in ("grouped", "sdpa"):
        model.set_attn_implementation(name)
        output = features(model, ids)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    for ours, expected in zip(*results, strict=True):
        # Qwen2 takes its norms in float32 in a model of any type.
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_both_models_take_it_and_none_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    grouped = attention.grouped_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(k.shape)
        return grouped(q, k, v)

    monkeypatch.setattr(attention, "grouped_attention", recorded)
    for name, kv_heads in (("openelm-tiny", 1), ("qwen2-tiny", 2)):
        model = build_model(name, vocab_size=64)
        features(model, torch.zeros(3, 64, dtype=torch.long))
        assert shapes == [(3, kv_heads, 64, 32)] * 2
        shapes.clear()
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "grouped" not in str(config)
