"""OpenELM against the original implementation's numbers, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llm_experiments.models.openelm import OpenELMConfig, OpenELMForCausalLM
from llm_experiments.models.presets import (
    MODEL_NAMES,
    build_model,
    classifier,
    features,
    idle_parameters,
    router_parameters,
)
from llm_experiments.models.starting_point import load_weights
from llm_experiments.tests.conftest import SHARED, needs_shared
from llm_experiments.text.preparation import PreparedCorpus

REFERENCE = "reference/openelm_tiny.safetensors"


@pytest.fixture(scope="module")
def tiny() -> OpenELMForCausalLM:
    model = build_model("openelm-tiny", vocab_size=64, dtype=torch.float64)
    assert isinstance(model, OpenELMForCausalLM)
    return model.eval()


@needs_shared(REFERENCE)
def test_reproduces_the_original_implementation() -> None:
    with safe_open(SHARED / REFERENCE, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = OpenELMConfig(**json.loads(metadata["config"]))
    assert config.num_query_heads == json.loads(metadata["num_query_heads"])
    assert config.num_kv_heads == json.loads(metadata["num_kv_heads"])
    assert config.ffn_multipliers == json.loads(metadata["ffn_multipliers_expanded"])
    model = OpenELMForCausalLM(config)
    weights = {name[7:]: t for name, t in tensors.items() if name.startswith("weight:")}
    model.load_state_dict(weights, strict=True)

    output = model(tensors["input_ids"], labels=tensors["input_ids"])
    output.loss.backward()

    torch.testing.assert_close(output.logits, tensors["logits"], atol=1e-5, rtol=0)
    assert output.loss.item() == pytest.approx(float(metadata["loss"]), abs=1e-6)
    gradients = {name[5:]: t for name, t in tensors.items() if name.startswith("grad:")}
    assert len(gradients) == 2
    for name, expected in gradients.items():
        difference = model.get_parameter(name).grad - expected
        assert difference.norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("openelm-270m", 32000, 271_527_168),
        ("openelm-270m", 32005, 271_533_568),
        ("openelm-450m", 32005, 457_186_816),
        ("openelm-1.1b", 32005, 1_079_901_696),
        ("openelm-3b", 32000, 3_036_647_424),
        ("openelm-3b", 32005, 3_036_662_784),
        ("qwen2-0.5b", 32005, 386_574_592),
        ("qwen2-1.5b", 32005, 1_359_500_288),
    ],
)
def test_parameter_counts(name: str, vocab_size: int, parameters: int) -> None:
    model = build_model(name, vocab_size=vocab_size, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_qwen2_7b_has_its_published_parameters() -> None:
    model = build_model("qwen2-7b", vocab_size=152064, tied=False, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_615_616_512


@pytest.mark.parametrize(
    ("name", "D", "layers", "kv", "ffn", "experts", "chosen", "width"),
    [("qwen2-moe-tiny", 128, 2, 64, 256, 8, 2, 64),
     ("qwen2-moe-0.5b", 896, 24, 128, 4864, 8, 2, 1216)],
)  # fmt: skip
def test_the_router_of_a_mixture_is_counted_apart(
    name: str, D: int, layers: int, kv: int, ffn: int, experts: int, chosen: int, width: int
) -> None:
    mixture, dense = (
        build_model(n, vocab_size=300, device="meta") for n in (name, name.replace("-moe", ""))
    )
    sizes = [sum(p.numel() for p in model.parameters()) for model in (mixture, dense)]
    router, gate = layers * D * experts, layers * D
    inside = layers * 3 * D * (experts * width + ffn // 2 - ffn)
    assert sizes[0] == sizes[1] + inside + router + gate
    assert (router_parameters(mixture), router_parameters(dense)) == (router, 0)
    # A token meets as many parameters as in the dense model, and those that choose.
    assert sizes[0] - idle_parameters(mixture) == sizes[1] + router + gate
    assert chosen * width + ffn // 2 == ffn


def test_layernorm_stands_where_rmsnorm_stood(tmp_path: Path) -> None:
    model = build_model("openelm-tiny", vocab_size=64, norm="layernorm", dtype=torch.float64)
    norms = [m for n, m in model.named_modules() if "norm" in n.rsplit(".", 1)[-1]]
    assert len(norms) == 2 * 4 + 1
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        x = 3 + torch.randn(5, len(norm.weight), dtype=torch.float64)
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(norm(x), centred / scale * norm.weight + norm.bias)
    model.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_published_head_counts() -> None:
    heads = build_model("openelm-270m", vocab_size=300, device="meta").config.num_query_heads
    assert heads == [12] * 5 + [16] * 7 + [20] * 4
    heads = build_model("openelm-3b", vocab_size=300, device="meta").config.num_query_heads
    assert heads == [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6


@pytest.mark.parametrize("name", ["openelm-tiny", "qwen2-tiny"])
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    first, again = (build_model(name, vocab_size=300, seed=3).state_dict() for _ in range(2))
    other = build_model(name, vocab_size=300, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["openelm-tiny", "qwen2-tiny"])
def test_classifier_times_features_are_the_logits(name: str) -> None:
    model = build_model(name, vocab_size=300).eval()
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = features(model, ids) @ classifier(model).T
    torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_initial_scale_is_the_originals() -> None:
    model = build_model("openelm-tiny", vocab_size=4096)
    assert isinstance(model, OpenELMForCausalLM)
    width, layers = 128, 2
    layer = model.transformer.layers[1]
    residual = (2 * layers * width) ** -0.5
    for tensor, std in (
        (model.transformer.token_embeddings.weight, width**-0.5),
        (layer.attn.qkv_proj.weight, width**-0.5),
        (layer.ffn.proj_1.weight, width**-0.5),
        (layer.attn.out_proj.weight, residual),
        (layer.ffn.proj_2.weight, residual),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.03)


def test_a_token_does_not_see_what_follows(tiny: OpenELMForCausalLM) -> None:
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 7:] = 50
    difference = (tiny(ids).logits - tiny(changed).logits).abs().amax(dim=(0, 2))
    assert difference[:7].max() < 1e-12
    assert difference[7:].min() > 1e-3


def test_step_by_step_equals_all_at_once(tiny: OpenELMForCausalLM) -> None:
    ids = torch.arange(3, 13)[None]
    whole = tiny(ids).logits
    first = tiny(ids[:, :4], use_cache=True)
    rest = tiny(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), whole)


def test_padding_on_the_left_changes_nothing(tiny: OpenELMForCausalLM) -> None:
    ids = torch.arange(3, 11)[None]
    padded = torch.cat((torch.full((1, 3), 1), ids), dim=1)
    mask = (torch.arange(11) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = tiny(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 3:], tiny(ids).logits)


def test_generate_is_greedy_search_by_hand(tiny: OpenELMForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 11]])
    by_hand = ids
    for _ in range(6):
        by_hand = torch.cat((by_hand, tiny(by_hand).logits[:, -1:].argmax(-1)), dim=1)
    generated = tiny.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=99
    )
    assert generated.tolist() == by_hand.tolist()


def test_saved_and_loaded_is_the_same(tiny: OpenELMForCausalLM, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "transformer.token_embeddings.weight" in file.keys()  # noqa: SIM118
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(loaded, OpenELMForCausalLM)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, tiny(ids).logits, rtol=1e-12, atol=1e-12)


# apple/OpenELM-270M's config.json, for another size: fields, forms and code that it names.
OFFICIAL = {
    "activation_fn_name": "swish",
    "architectures": ["OpenELMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_openelm.OpenELMConfig",
        "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim_divisor": 32,
    "ffn_multipliers": [0.5, 4.0],
    "ffn_with_glu": True,
    "head_dim": 32,
    "initializer_range": 0.02,
    "max_context_length": 2048,
    "model_dim": 128,
    "model_type": "openelm",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "num_gqa_groups": 4,
    "num_kv_heads": [1, 1],
    "num_query_heads": [4, 4],
    "num_transformer_layers": 2,
    "qkv_multipliers": [0.5, 1.0],
    "rope_freq_constant": 10000,
    "rope_max_length": 4096,
    "share_input_output_layers": True,
    "torch_dtype": "float32",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "vocab_size": 300,
}


def test_an_official_folder_is_read_and_trained_on_without_its_code(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    original = build_model("openelm-tiny", vocab_size=300, seed=5)
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    for name in ("configuration_openelm.py", "modeling_openelm.py"):
        (tmp_path / name).write_text("raise SystemExit('remote code was run')")
    official = {k: v for k, v in original.state_dict().items() if k != "lm_head.weight"}
    save_file(official, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(10)[None]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    torch.testing.assert_close(read(ids).logits, original(ids).logits)
    start = build_model("openelm-tiny", vocab_size=300, seed=0)
    load_weights(start, tmp_path, corpus)
    torch.testing.assert_close(start(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ffn_with_glu", False),
        ("activation_fn_name", "gelu"),
        ("num_query_heads", [1] * 16),
        ("ffn_multipliers", [0.5, 1.0, 4.0]),
    ],
)
def test_an_unsupported_config_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        OpenELMConfig(**{field: value})


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gpt-9'.*openelm-270m"):
        build_model("gpt-9", vocab_size=300)
    assert "openelm-3b" in MODEL_NAMES
