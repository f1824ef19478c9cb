"""A dozen architectures against one token at a time, with and without windows, in two types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from llm_experiments.audit import measure
from llm_experiments.models.openelm import OpenELMConfig, OpenELMForCausalLM

V, CONTEXT = 97, 12
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
SHAPE |= {"intermediate_size": 64, "max_position_embeddings": 40}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
OPENELM = {"model_dim": 32, "head_dim": 8, "num_transformer_layers": 2, "ffn_dim_divisor": 8}
T = transformers
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "gpt2": (
        T.GPT2LMHeadModel,
        T.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    ),
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(num_key_value_heads=2, **SHAPE)),
    "qwen2": (T.Qwen2ForCausalLM, T.Qwen2Config(num_key_value_heads=2, **SHAPE)),
    "gemma2": (T.Gemma2ForCausalLM, T.Gemma2Config(**SHAPE, **GEMMA)),
    "gemma3": (T.Gemma3ForCausalLM, T.Gemma3TextConfig(**SHAPE, **GEMMA)),
    "opt": (
        T.OPTForCausalLM,
        T.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **SHAPE),
    ),
    "gpt-neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**SHAPE)),
    "mamba": (
        T.MambaForCausalLM,
        T.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
    ),
    "mixtral": (T.MixtralForCausalLM, T.MixtralConfig(num_key_value_heads=2, **SHAPE)),
    "olmo2": (T.Olmo2ForCausalLM, T.Olmo2Config(**SHAPE)),
    "bloom": (T.BloomForCausalLM, T.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
    "openelm": (OpenELMForCausalLM, OpenELMConfig(vocab_size=V, **OPENELM)),
    "bert": (T.BertLMHeadModel, T.BertConfig(is_decoder=True, **SHAPE)),
}


def literal_windows(n: int, stride: int | None, prefix: int) -> Iterator[tuple[int, int]]:
    """For each next token of a document: its place, and where the tokens before it begin."""
    if stride is None:
        yield from ((place, 0) for place in range(1, n))
        return
    for place in range(1, n):
        end = CONTEXT
        while end <= place:  # the first window that reaches it
            end += stride
        yield place, 0 if end == CONTEXT else end - (CONTEXT - prefix)


@torch.no_grad()
def literal(
    model: PreTrainedModel, sequences: list[Tensor], stride: int | None, prefix: list[int]
) -> tuple[list[float], list[int]]:
    """Losses and predictions, one forward pass a token."""
    losses, predictions = [], []
    for ids in sequences:
        for place, begin in literal_windows(len(ids), stride, len(prefix)):
            seen = ids[begin:place]
            if begin:
                seen = torch.tensor([*prefix, *seen.tolist()])
            logits = model(input_ids=seen[None], use_cache=False).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[ids[place]]))
            predictions.append(int(logits.argmax()))
    return losses, predictions


@pytest.mark.parametrize(("stride", "prefix"), [(None, []), (5, []), (4, [3])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_is_measured_token_by_token(
    name: str, dtype: torch.dtype, stride: int | None, prefix: list[int]
) -> None:
    """Types of 8 bits less round what is summed in another order: there to 2 % of a loss."""
    kind, config = MODELS[name]
    torch.manual_seed(1)
    model = kind(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = (12, 30, 5, 13, 17) if stride else (12, 8, 5, 2)
    sequences = [torch.randint(V, (length,), generator=generator) for length in lengths]
    if prefix:
        for ids in sequences:
            ids[0] = prefix[0]
    expected, predictions = literal(model, sequences, stride, prefix)
    for batch_size in (1, 3):
        found = measure(
            model,
            sequences,
            context=CONTEXT,
            stride=stride,
            prefix=prefix,
            batch_size=batch_size,
        )
        assert found.starts.tolist() == np.cumsum([0, *(n - 1 for n in lengths)]).tolist()
        assert found.target.tolist() == [int(i) for ids in sequences for i in ids[1:]]
        if dtype == torch.float32:
            np.testing.assert_allclose(found.loss, expected, rtol=2e-6, atol=2e-6)
            assert found.predicted.tolist() == np.bincount(predictions, minlength=V).tolist()
            right = [p == t for p, t in zip(predictions, found.target.tolist(), strict=True)]
            assert found.correct.tolist() == right
        else:
            np.testing.assert_allclose(found.loss, expected, atol=2e-2 * max(expected))


@pytest.mark.parametrize(("context", "stride"), [(12, 12), (12, 0), (12, 11)])
def test_a_stride_leaves_a_token_to_predict_from(context: int, stride: int) -> None:
    kind, config = MODELS["llama"]
    ids = [torch.arange(40)]
    with pytest.raises(ValueError, match=rf"stride is {stride}; expected 1 to 10 of the context"):
        measure(kind(config), ids, context=context, stride=stride, prefix=[1, 2])


def test_where_there_is_no_room_a_batch_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = MODELS["llama"]
    model = kind(config).eval()
    sequences = [torch.arange(3, n) for n in range(8, 17)]
    expected = measure(model, sequences, batch_size=1)
    forward = model.forward

    def small(input_ids: Tensor, **rest: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", small)
    found = measure(model, sequences)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert found.predicted.tolist() == expected.predicted.tolist()
