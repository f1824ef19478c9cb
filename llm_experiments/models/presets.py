"""The named models of the study and how to build them.

transformers is imported where a model is built, not here: it takes seconds, and the command line
needs no more than the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Initialisation = Literal["corenet", "huggingface"]
Norm = Literal["rmsnorm", "layernorm"]

# Layers, D, head width; the multipliers are those of every OpenELM (Mehta et al., 2024, Table 9).
_OPENELM: dict[str, dict[str, int]] = {
    "openelm-tiny": {
        "num_transformer_layers": 2, "model_dim": 128, "head_dim": 32, "ffn_dim_divisor": 32,
    },
    "openelm-270m": {"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64},
    "openelm-450m": {"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64},
    "openelm-1.1b": {"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64},
    "openelm-3b": {"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128},
}  # fmt: skip

# Hidden width, layers, heads, key-value heads, feed-forward width (Yang et al., 2024, Table 1) and
# standard deviation of the initial weights: 0.02 at the published widths, D^-1/2 for the tiny one.
_QWEN2: dict[str, tuple[int, int, int, int, int, float]] = {
    "qwen2-tiny": (128, 2, 4, 2, 256, 128**-0.5),
    "qwen2-0.5b": (896, 24, 14, 2, 4864, 0.02),
    "qwen2-1.5b": (1536, 28, 12, 2, 8960, 0.02),
    "qwen2-7b": (3584, 28, 28, 4, 18944, 0.02),
    "qwen2-moe-tiny": (128, 2, 4, 2, 256, 128**-0.5),
    "qwen2-moe-0.5b": (896, 24, 14, 2, 4864, 0.02),
}

# Mixtures of experts in place of the feed-forward part of the model without "-moe", of its own
# width for each token: a shared expert of half that width, and experts, how many of them there are,
# how many a token goes to, and the width of each. No published sizes.
_EXPERTS = {"qwen2-moe-tiny": (8, 2, 64), "qwen2-moe-0.5b": (8, 2, 1216)}

MODEL_NAMES = (*_OPENELM, *_QWEN2)


def check_norm(name: str, norm: Norm) -> None:
    """ValueError for a norm that transformers' class of a model does not have."""
    if norm != "rmsnorm" and name in _QWEN2:
        raise ValueError(f"norm is {norm!r}; {name} has rmsnorm alone: expected an OpenELM")


def build_model(
    name: str,
    *,
    vocab_size: int,
    seed: int = 0,
    tied: bool = True,
    initialisation: Initialisation = "corenet",
    norm: Norm = "rmsnorm",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A freshly initialised model; the weights are a function of the arguments but for the device.

    The published models are tied: their embedding matrix is the classifier too. With
    ``initialisation="huggingface"`` every matrix is N(0, 0.02^2), as `initializer_range` of their
    transformers format has it; Qwen2 at the published widths is so in any case.

    On ``device="meta"`` nothing is allocated, which is enough to count parameters.

    Raises:
        ValueError: an unknown name, a vocabulary of fewer than two tokens, or a norm that the model
            does not have.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"model {name!r} is unknown; expected one of {', '.join(MODEL_NAMES)}")
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 2")
    check_norm(name, norm)
    # Weights are drawn in float32 on the CPU, so that they are the same on every device.
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if str(device) == "meta" else "cpu"),
    ):
        torch.manual_seed(seed)
        if name in _OPENELM:
            model = _build_openelm(name, vocab_size, tied, initialisation, norm)
        else:
            model = _build_qwen2(name, vocab_size, tied, initialisation)
    return model if str(device) == "meta" else model.to(device=device, dtype=dtype)


def _build_openelm(
    name: str, vocab_size: int, tied: bool, initialisation: Initialisation, norm: Norm
) -> PreTrainedModel:
    from llm_experiments.models.openelm import OpenELMConfig, OpenELMForCausalLM

    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = OpenELMConfig(
        vocab_size=vocab_size,
        share_input_output_layers=tied,
        normalization_layer_name={"rmsnorm": "rms_norm", "layernorm": "layer_norm"}[norm],
        **_OPENELM[name],
        **special,
    )
    model = OpenELMForCausalLM(config)
    if initialisation == "huggingface":
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
    return model


def _build_qwen2(
    name: str, vocab_size: int, tied: bool, initialisation: Initialisation
) -> PreTrainedModel:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )
    from transformers.masking_utils import sdpa_mask

    from llm_experiments.models.attention import attention_of_transformers

    # What is registered stays out of the config that is saved: others load the model with theirs.
    AttentionInterface.register("grouped", attention_of_transformers)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    width, layers, heads, kv_heads, ffn, initial_std = _QWEN2[name]
    # Everything is stated, since the defaults of the classes are those of larger models.
    stated: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02 if initialisation == "huggingface" else initial_std,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "attn_implementation": "grouped",
    }
    if name not in _EXPERTS:
        return Qwen2ForCausalLM(Qwen2Config(**stated))
    experts, chosen, expert_width = _EXPERTS[name]
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **stated,
            num_experts=experts,
            num_experts_per_tok=chosen,
            moe_intermediate_size=expert_width,
            shared_expert_intermediate_size=ffn // 2,
            norm_topk_prob=True,
        )
    )


def router_parameters(model: PreTrainedModel) -> int:
    """How many parameters choose among a mixture's experts; 0 where there is none."""
    return sum(
        p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")
    )


def idle_parameters(model: PreTrainedModel) -> int:
    """How many parameters, those of the experts that it does not go to, a token does not meet."""
    if not router_parameters(model):
        return 0
    share = 1 - model.config.num_experts_per_tok / model.config.num_experts
    inside = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    return round(share * inside)


def features(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Last-layer features (B, T, D) of ids (B, T): what the classifier multiplies."""
    # Without a word on masks, Qwen2 looks whether positions start anew within a sequence: the host
    # waits for a GPU at every step, and a compiled model, which cannot look, gets a full mask.
    masks = (
        {"attention_mask": {"full_attention": None}}
        if model.config.model_type.startswith("qwen2")
        else {}
    )
    return model.base_model(input_ids=input_ids, use_cache=False, **masks).last_hidden_state


def classifier(model: PreTrainedModel) -> nn.Parameter:
    """The (V, D) matrix that turns features into logits."""
    return model.get_output_embeddings().weight
