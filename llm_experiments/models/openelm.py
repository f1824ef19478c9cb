"""OpenELM (Mehta et al., 2024) as a transformers model with the official key names.

transformers does not ship OpenELM; with the official names, official checkpoints and their
``config.json`` load here without remote code. Shapes: B batch, T tokens, D model width, Q query
heads, K key-value heads, C head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llm_experiments.models.attention import attention


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least 90 % of it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


class OpenELMConfig(PreTrainedConfig):
    """Layer-wise scaled transformer; fields are those of the official ``config.json``.

    ``qkv_multipliers`` and ``ffn_multipliers`` are either two numbers (first and last layer,
    interpolated linearly and rounded to two digits) or one number for each layer.
    ``num_query_heads`` and ``num_kv_heads`` follow from them; a file that states others is refused.

    Raises:
        ValueError: an unsupported variant, or head counts that contradict the multipliers.
    """

    model_type = "openelm"
    attribute_map = {"num_hidden_layers": "num_transformer_layers", "hidden_size": "model_dim"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        num_transformer_layers: int = 16,
        model_dim: int = 1280,
        head_dim: int = 64,
        qkv_multipliers: float | list[float] | tuple[float, ...] = (0.5, 1.0),
        num_query_heads: list[int] | None = None,
        num_kv_heads: list[int] | None = None,
        num_gqa_groups: int = 4,
        ffn_multipliers: float | list[float] | tuple[float, ...] = (0.5, 4.0),
        ffn_with_glu: bool = True,
        ffn_dim_divisor: int = 256,
        activation_fn_name: str = "swish",
        normalization_layer_name: str = "rms_norm",
        normalize_qk_projections: bool = True,
        share_input_output_layers: bool = True,
        rope_freq_constant: int = 10000,
        rope_max_length: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs: Any,
    ) -> None:
        supported = {
            "ffn_with_glu": (ffn_with_glu, True),
            "activation_fn_name": (activation_fn_name, "swish"),
            "normalize_qk_projections": (normalize_qk_projections, True),
        }
        for name, (value, expected) in supported.items():
            if value != expected:
                raise ValueError(f"OpenELM {name} is {value!r}; only {expected!r} is supported")
        if normalization_layer_name not in _NORMS:
            raise ValueError(
                f"OpenELM normalization_layer_name is {normalization_layer_name!r}; "
                f"expected one of {', '.join(_NORMS)}"
            )
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.num_transformer_layers = num_transformer_layers
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.num_gqa_groups = num_gqa_groups
        self.ffn_with_glu = ffn_with_glu
        self.ffn_dim_divisor = ffn_dim_divisor
        self.activation_fn_name = activation_fn_name
        self.normalization_layer_name = normalization_layer_name
        self.normalize_qk_projections = normalize_qk_projections
        self.share_input_output_layers = share_input_output_layers
        self.rope_freq_constant = rope_freq_constant
        self.rope_max_length = rope_max_length
        self.initializer_range = initializer_range
        self.use_cache = use_cache

        self.qkv_multipliers = qkv_multipliers
        self.ffn_multipliers = self._by_layer("ffn_multipliers", ffn_multipliers)
        qkv = self._by_layer("qkv_multipliers", qkv_multipliers)
        head_divisor = head_dim * num_gqa_groups
        self.num_query_heads = [
            make_divisible(model_dim * multiplier, head_divisor) // head_dim for multiplier in qkv
        ]
        self.num_kv_heads = [heads // num_gqa_groups for heads in self.num_query_heads]
        for name, stated in (("num_query_heads", num_query_heads), ("num_kv_heads", num_kv_heads)):
            if stated is not None and list(stated) != getattr(self, name):
                raise ValueError(
                    f"OpenELM {name} is {stated}; the multipliers give {getattr(self, name)}"
                )
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=kwargs.pop("tie_word_embeddings", share_input_output_layers),
            **kwargs,
        )

    def _by_layer(
        self, name: str, multipliers: float | list[float] | tuple[float, ...]
    ) -> list[float]:
        """One multiplier for each layer."""
        layers = self.num_transformer_layers
        if isinstance(multipliers, int | float):
            return [float(multipliers)] * layers
        if len(multipliers) == layers:
            return [float(multiplier) for multiplier in multipliers]
        if len(multipliers) == 2:
            return [round(float(value), 2) for value in np.linspace(*multipliers, num=layers)]
        raise ValueError(
            f"OpenELM {name} has {len(multipliers)} entries; expected 2 or one a layer ({layers})"
        )

    def ffn_dim(self, layer: int) -> int:
        """Width of the gated feed-forward part of a layer."""
        return make_divisible(self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor)


class OpenELMRMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square taken in float32 (or wider)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape (..., width), to the same shape and type."""
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms_norm": OpenELMRMSNorm,
    "layer_norm": lambda width: nn.LayerNorm(width, eps=1e-6),
}


def rotary_tables(
    config: OpenELMConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, 1, T, C) of the half-rotation RoPE, computed in ``dtype``."""
    exponent = (
        torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    )
    frequencies = config.rope_freq_constant**-exponent
    angles = positions[:, None, :, None].to(dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the precision of its tables; the result has the type of ``x``."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class OpenELMAttention(nn.Module):
    """Grouped-query attention with one fused projection and per-head norms of queries and keys."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_q_heads = config.num_query_heads[layer]
        self.num_kv_heads = config.num_kv_heads[layer]
        heads = self.num_q_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.model_dim, heads * config.head_dim, bias=False)
        self.q_norm = _NORMS[config.normalization_layer_name](config.head_dim)
        self.k_norm = _NORMS[config.normalization_layer_name](config.head_dim)
        self.out_proj = nn.Linear(self.num_q_heads * config.head_dim, config.model_dim, bias=False)
        self.out_proj.is_residual = True

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """x (B, T, D) mixed over the positions that it may look at.

        cos and sin are those of `rotary_tables`, the mask that of `causal_mask`; without one the
        keys are the T positions themselves, causally. A cache takes up the new keys and values.
        """
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_q_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = attention(q, k, v, mask)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class OpenELMFeedForward(nn.Module):
    """GLU with swish: the first half of ``proj_1`` gates the second."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        width = config.ffn_dim(layer)
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.proj_2.is_residual = True

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D), each position by itself."""
        gate, value = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * value)


class OpenELMDecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, both residual."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFeedForward(config, layer)
        self.attn_norm = _NORMS[config.normalization_layer_name](config.model_dim)
        self.ffn_norm = _NORMS[config.normalization_layer_name](config.model_dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """x (B, T, D) after the layer; the rest as in `OpenELMAttention.forward`."""
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class OpenELMPreTrainedModel(PreTrainedModel):
    """Initialisation and loading shared by the two classes below."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["OpenELMDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        """The original initialisation: residual projections scaled by (2 L)^-1/2."""
        width, layers = self.config.model_dim, self.config.num_transformer_layers
        if isinstance(module, nn.Linear):
            residual = getattr(module, "is_residual", False)
            std = (2 * layers * width) ** -0.5 if residual else module.in_features**-0.5
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=width**-0.5)
        elif isinstance(module, OpenELMRMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)


class OpenELMModel(OpenELMPreTrainedModel):
    """Token embeddings, the layers and the last norm: (B, T) ids to (B, T, D) features."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            OpenELMDecoderLayer(config, layer) for layer in range(config.num_transformer_layers)
        )
        self.norm = _NORMS[config.normalization_layer_name](config.model_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The (V, D) embedding of the ids."""
        return self.token_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another (V, D) embedding in its place, as a resize of the vocabulary does."""
        self.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Features (B, T, D) after the last norm.

        Args:
            input_ids: (B, T), or else their embeddings ``inputs_embeds`` (B, T, D).
            attention_mask: (B, past + T), 0 at padding; without it there is none.
            position_ids: (B, T); default: on from the past.
            past_key_values: keys and values of earlier tokens, to which those of these are added.
            use_cache: return them, from nothing where there is no past.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        queries = torch.arange(past, past + x.shape[1], device=x.device)
        positions = queries[None] if position_ids is None else position_ids
        # RoPE is computed in float32 as in the original, in float64 for a float64 model.
        table_dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_tables(self.config, positions, table_dtype)
        mask = causal_mask(queries, attention_mask) if past or attention_mask is not None else None
        for layer in self.layers:
            x = layer(x, cos, sin, mask, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )


def causal_mask(queries: Tensor, attention_mask: Tensor | None) -> Tensor:
    """True where a query may look: (B, 1, T, S), or (1, 1, T, S) without padding."""
    keys = torch.arange(int(queries[-1]) + 1, device=queries.device)
    causal = (keys[None, :] <= queries[:, None])[None, None]
    if attention_mask is None:
        return causal
    # A padded query sees itself, so that no row is empty (its softmax would be NaN).
    itself = (keys[None, :] == queries[:, None])[None, None]
    return (causal & attention_mask[:, None, None, :].bool()) | itself


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """OpenELM with its logits: the classifier is the embedding matrix, or one of its own."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        if not config.share_input_output_layers:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The (V, D) embedding of the ids."""
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another (V, D) embedding in its place, as a resize of the vocabulary does."""
        self.transformer.token_embeddings = value

    def get_output_embeddings(self) -> nn.Embedding | nn.Linear:
        """The module whose (V, D) weight is the classifier."""
        tied = self.config.share_input_output_layers
        return self.transformer.token_embeddings if tied else self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with ``labels`` the loss in nats, as transformers' models do.

        Arguments as in `OpenELMModel.forward`, and

        Args:
            labels: (B, T), the ids themselves: position t is to predict label t + 1; -100 is none.
                Nothing is cached then.
            logits_to_keep: of the last so many positions only; 0 for all.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(self.config.use_cache if use_cache is None else use_cache)
            and labels is None,
        )
        features = output.last_hidden_state[:, -logits_to_keep:]
        logits = F.linear(features, self.get_output_embeddings().weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )


AutoConfig.register(OpenELMConfig.model_type, OpenELMConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
