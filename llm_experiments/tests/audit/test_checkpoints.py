"""What is read of a checkpoint's folder: the tokenizer as its file says, causal models alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from transformers import PreTrainedModel

from llm_experiments.audit import load, load_tokenizer, measure, tokenize
from llm_experiments.audit.checkpoints import check_against_file
from llm_experiments.configs import DataConfig, SweepConfig, TrainingConfig
from llm_experiments.models.causality import is_causal
from llm_experiments.models.presets import build_model
from llm_experiments.sweep import sweep
from llm_experiments.text.corpora import load_corpus
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model


def test_a_model_that_was_trained_here_has_the_losses_of_its_run(
    data: DataConfig, tmp_path: Path
) -> None:
    """Every kind of model that is saved, on a text with capitals, whose tokenizer lower-cases."""
    text = tmp_path / "text"
    text.mkdir()
    documents = [f"{d.capitalize()} It's 1 of {n}." for n, d in enumerate(load_corpus(data))]
    (text / "a.txt").write_text("\n\n".join(documents))
    shaped = replace(data, data_dir=text, num_sequences=None, packing=False, held_out=0, context=12)
    training = TrainingConfig(steps=4, batch_size=32, evaluate_every=4)
    grid = SweepConfig(
        study="s", runs_dir=tmp_path, models=("openelm-tiny", "qwen2-tiny"), weight_decays=(0.1,)
    )
    sweep(replace(grid, data=shaped, training=training, save_model=True, device="cpu"))
    folders = sorted((tmp_path / "s").glob("*/model"))
    assert len(folders) == 2
    for folder in folders:
        model, tokenizer = load(folder)
        found = measure(model, tokenize(tokenizer, documents, 12)).metrics
        with xr.open_dataset(folder.parent / "classes.nc", engine="h5netcdf") as own:
            assert found.count.tolist() == own.final_count.values.tolist()
            np.testing.assert_allclose(found.loss, own.final_loss.values, atol=1e-6, rtol=1e-6)


@pytest.fixture
def qwen2(corpus: PreparedCorpus, tmp_path: Path) -> Path:
    folder = tmp_path / "qwen2"
    save_model(build_model("qwen2-tiny", vocab_size=corpus.vocab_size), corpus, folder)
    return folder


def test_a_class_that_tokenises_otherwise_than_its_file_is_refused(qwen2: Path) -> None:
    """transformers' own class for this type of model neither lower-cases nor splits alike."""
    theirs = transformers.AutoTokenizer.from_pretrained(qwen2)
    ours = load_tokenizer(qwen2)
    text = ["Words WITH Capitals"]
    assert theirs(text)["input_ids"] != ours(text)["input_ids"]
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer gives other ids than .*tokenizer.json"):
        check_against_file(theirs, text)
    check_against_file(ours, text)
    check_against_file(transformers.PreTrainedTokenizerFast.from_pretrained(qwen2), text)


def test_a_tokenizer_without_tokenizer_json_is_that_of_its_class(
    qwen2: Path, corpus: PreparedCorpus
) -> None:
    model = json.loads(corpus.tokenizer().to_str())["model"]
    (qwen2 / "vocab.json").write_text(json.dumps(model["vocab"]))
    (qwen2 / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (qwen2 / "tokenizer.json").unlink()
    (qwen2 / "trainer_state.json").write_text('{"loss": NaN}')
    (qwen2 / "eval_results.json").write_text("[1]")
    os.truncate(os.open(qwen2 / "optimizer.pt", os.O_CREAT | os.O_RDWR), 10**10)
    path = qwen2 / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    legacy = {"special_tokens_map_file": "/home/someone/special_tokens_map.json"}
    path.write_text(json.dumps(settings | legacy))
    words = ["some words", "a word"]
    expected = [corpus.tokenizer().encode(text).ids for text in words]
    assert load(qwen2)[1](words)["input_ids"] == expected


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        text = json.dumps(json.loads(path.read_text()) | values)
        path.write_text(text)

    return change


def _sparse(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(os.open(folder / name, os.O_CREAT | os.O_RDWR), 10**10)


def _written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    "change",
    [
        *(_sparse(name) for name in ("optimizer.pt", "pytorch_model.bin", "rust_model.ot")),
        _written("trainer_state.json", '{"log_history": [{"loss": NaN}]}'),
        _written("trainer_state.json", json.dumps({"log_history": [{"step": 1.5}] * 400_000})),
        _written("all_results.json", "[1]"),
        _written("vocab.json", json.dumps({f"token{i:020d}": i for i in range(150_000)})),
        _written("tokenizer_config.json", '{"special_tokens_map_file": "/x", "vocab_file": "/y"}'),
        _config(num_parameters=124_439_808, seed=2**31, rope_cap=float("inf")),
        lambda folder: os.mkfifo(folder / "merges.txt"),
    ],
)
def test_what_is_not_opened_is_not_looked_at(
    change: Callable[[Path], None], qwen2: Path, data: DataConfig
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before, tokenizer = load(qwen2)
    change(qwen2)
    after, same = load(qwen2)
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert same(load_corpus(data)[0])["input_ids"] == tokenizer(load_corpus(data)[0])["input_ids"]


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
SHAPE |= {"intermediate_size": 64}


def _bert(**more: Any) -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE, **more))


def _decoder() -> PreTrainedModel:
    return transformers.BertLMHeadModel(transformers.BertConfig(is_decoder=True, **SHAPE))


def _roberta() -> PreTrainedModel:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SHAPE))


def _electra() -> PreTrainedModel:
    return transformers.ElectraForMaskedLM(transformers.ElectraConfig(embedding_size=8, **SHAPE))


def _mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(num_key_value_heads=2, **SHAPE)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "causal"),
    [(_bert, False), (_roberta, False), (_electra, False), (_decoder, True), (_mixtral, True)],
)
def test_a_later_token_tells_whether_a_model_is_causal(
    make: Callable[[], PreTrainedModel], causal: bool, dtype: torch.dtype
) -> None:
    """With first weights as they are drawn, through which little passes from token to token."""
    torch.manual_seed(0)
    assert is_causal(make().to(dtype)) == causal


@pytest.mark.parametrize("make", [_bert, _electra])
def test_a_masked_model_is_refused(
    make: Callable[[], PreTrainedModel], corpus: PreparedCorpus, tmp_path: Path
) -> None:
    save_model(make(), corpus, tmp_path)
    with pytest.raises(ValueError, match="sees the tokens after the one it is asked for"):
        load(tmp_path)
