"""Training from a local checkpoint: the weights it starts from, its id, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_experiments.configs import DataConfig, RunConfig, SweepConfig, TrainingConfig
from llm_experiments.models.presets import build_model
from llm_experiments.models.starting_point import load_weights
from llm_experiments.sweep import sweep
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model
from run_store import read_study


@pytest.fixture(params=["openelm-tiny", "qwen2-tiny"])
def checkpoint(request: pytest.FixtureRequest, corpus: PreparedCorpus, tmp_path: Path) -> Path:
    model = build_model(request.param, vocab_size=corpus.vocab_size, seed=7)
    save_model(model, corpus, tmp_path / request.param)
    return tmp_path / request.param


def test_the_weights_are_those_of_the_folder(checkpoint: Path, corpus: PreparedCorpus) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] == "openelm":  # as in official files: expanded, one a layer
        assert len(config["ffn_multipliers"]) == config["num_transformer_layers"]
    model = build_model(checkpoint.name, vocab_size=corpus.vocab_size, seed=0)
    load_weights(model, checkpoint, corpus)
    wanted = build_model(checkpoint.name, vocab_size=corpus.vocab_size, seed=7).state_dict()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in model.state_dict().items())


def damage(folder: Path, fault: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    if fault == "vocabulary":
        config["vocab_size"] = 999
    elif fault == "type":
        config["model_type"] = "gpt2"
    elif fault == "norm":
        config |= {"rope_freq_constant": 7, "rms_norm_eps": 0.5}
    elif fault == "missing":
        del weights[first]
    elif fault == "shape":
        weights[first] = weights[first][:-1].clone()
    elif fault == "torn":
        (folder / "model.safetensors").write_bytes(b"torn")
    elif fault == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"<mask>"', '"<other>"'))
    (folder / "config.json").write_text(json.dumps(config))
    if fault != "torn":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("vocabulary", "vocabulary of 999, the corpus one of 300"),
        ("type", "openelm|qwen2"),
        ("norm", "rope_freq_constant 7|rms_norm_eps 0.5"),
        ("missing", "has nothing for .*; expected"),
        ("shape", r"has \(\d+.* for .*; expected \(\d+"),
        ("torn", "safetensors"),
        ("tokenizer", "is not the tokenizer of the corpus"),
    ],
)
def test_what_does_not_fit_is_one_line(
    checkpoint: Path, corpus: PreparedCorpus, fault: str, said: str
) -> None:
    damage(checkpoint, fault)
    model = build_model(checkpoint.name, vocab_size=corpus.vocab_size)
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(model, checkpoint, corpus)
    assert len(str(caught.value).splitlines()) == 1
    assert str(checkpoint) in str(caught.value)


def test_the_id_of_a_run_holds_the_weights_and_no_path(
    checkpoint: Path, data: DataConfig, tmp_path: Path
) -> None:
    def config_of(folder: Path | None) -> dict[str, object]:
        return RunConfig().resolved(replace(data, checkpoint_dir=folder), "hash")

    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    before = config_of(checkpoint)
    assert before == config_of(moved) != config_of(None)
    weights = load_file(moved / "model.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert config_of(moved) != before


def test_training_goes_on_from_a_model_that_a_run_kept(data: DataConfig, tmp_path: Path) -> None:
    training = TrainingConfig(steps=6, batch_size=4, evaluate_every=6, learning_rate=1e-2)
    grid = SweepConfig(
        study="first",
        runs_dir=tmp_path,
        models=("openelm-tiny",),
        weight_decays=(0.0,),
        training=training,
        data=data,
        device="cpu",
        save_model=True,
    )
    assert sweep(grid)["finished"] == 1
    first = read_study(tmp_path / "first").runs[0]
    onward = replace(data, checkpoint_dir=first.folder / "model")
    still = replace(training, steps=1, warmup_steps=1)  # whose learning rate is 0
    assert sweep(replace(grid, study="second", data=onward, training=still))["finished"] == 1
    second = read_study(tmp_path / "second").runs[0]
    assert first.id != second.id
    before, after = (run.classes()["final_loss"].values for run in (first, second))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)  # the same weights in float32
