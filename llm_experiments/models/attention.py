"""Causal grouped-query attention for short contexts on a CPU, where torch's own is slow.

torch's kernel for the CPU wants a key and a value for every query head, so the few there are have
to be repeated, and it works in blocks made for long contexts. Here the query heads of a group lie
under each other as rows of one matrix, so a group is one product with its keys and one with its
values. Shapes: B batch, T tokens, S tokens that are seen, Q query heads, K key-value
heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Values mixed for every query: (B, Q, T, C), as q; k and v are (B, K, S, C), K divides Q.

    mask is True where a query may look, broadcast to (B, Q, T, S). Without one the keys are the
    queries' own positions, S = T, and each sees itself and those before it. Scores are scaled by
    C^-1/2.
    """
    if mask is None and grouped_pays(q, k):
        return grouped_attention(q, k, v)
    groups = q.shape[1] // k.shape[1]
    # torch shares keys among queries in a GPU's kernels for half precision without a mask alone; on
    # a CPU it then adds up the gradients of a group in half precision.
    shared = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and mask is None
    if not shared:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
    )


def grouped_pays(q: Tensor, k: Tensor) -> bool:
    """Whether `grouped_attention` is faster and keeps no more.

    It keeps T weights a query where torch's attention keeps repeated keys and values, 2 C numbers.
    In half precision torch's softmax is float32 inside, and this one's would be too narrow.
    """
    length, width = q.shape[2:]
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and k.shape[2] == length <= 2 * width
        and k.shape[1] < q.shape[1]
    )


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal `attention` by two batched products, no key or value repeated."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    rows = (q * width**-0.5).reshape(batch * kv_heads, groups * length, width)
    keys, values = (x.reshape(batch * kv_heads, length, width) for x in (k, v))
    hidden = q.new_full((length, length), -torch.inf).triu(1).repeat(groups, 1)
    weights = torch.baddbmm(hidden, rows, keys.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights, values).view(batch, heads, length, width)


def attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same as transformers calls it; its own does what ours does not, or not faster.

    The result is (B, T, Q, C). The scale is C^-1/2 in either, as Qwen2 has it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = attention_mask is None and options.get("is_causal") is not False
    if causal and not options.get("dropout") and grouped_pays(query, key):
        return grouped_attention(query, key, value).transpose(1, 2), None
    mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return mixed, None
