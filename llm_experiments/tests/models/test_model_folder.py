"""A model's folder from hostile hands: no code, no other files, no model beyond its weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_experiments.audit import load
from llm_experiments.models.presets import build_model
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import save_model


@pytest.fixture(scope="module")
def sound(corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    save_model(build_model("qwen2-tiny", vocab_size=corpus.vocab_size), corpus, folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def _set(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _sharded(shard: str, **more: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}} | more
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _as_a_class(*changes: Callable[[Path], None], **values: Any) -> Callable[[Path], None]:
    """Without tokenizer.json a class of transformers opens the other files."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text("{}")
        for other in (*changes, _set("tokenizer_config.json", **values)):
            other(folder)

    return change


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("config.json", num_hidden_layers=2**12, layer_types=None),
            "much larger than its weights",
        ),
        (_set("config.json", num_hidden_layers=2**40), "num_hidden_layers is 1099511627776"),
        (_set("config.json", hidden_size=2**20), "much larger than its weights"),
        (_set("config.json", vocab_size=2**24), "much larger than its weights"),
        (_set("config.json", attn_implementation="evil/kernel"), "expected eager or sdpa"),
        (_set("config.json", quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (_set("config.json", transformers_weights="../outside.safetensors"), "transformers_weight"),
        (_set("config.json", hidden_act="__import__('os')"), "could not be loaded"),
        (_as_a_class(vocab_file="/etc/passwd"), "vocab_file is '/etc/passwd'"),
        (_as_a_class(fast_tokenizer_files=["../tokenizer.1.json"]), "fast_tokenizer_files is"),
        (_set("config.json", num_labels=2**40), "num_labels is 1099511627776"),
        (_sharded("../outside.safetensors"), "not the name of a .safetensors file"),
        (_sharded("/etc/passwd"), "not the name of a .safetensors file"),
        (_sharded("/outside.safetensors"), "not the name of a .safetensors file"),
        (_sharded("x/../../outside.safetensors"), "not the name of a .safetensors file"),
        (_sharded("pytorch_model.bin"), "not the name of a .safetensors file"),
        (_sharded("x.safetensors", metadata=None), "no weight_map or no metadata"),
        (_pickled, "holds no model.safetensors"),
        (_as_a_class(_pipe("merges.txt")), "neither file nor folder"),
        (_pipe("tokenizer.json"), "neither file nor folder"),
        (_pipe("config.json"), "expected a folder with config.json"),
        (_pipe("generation_config.json"), "not a regular file"),
        (_pipe("model.safetensors"), "not a regular file"),
        (_file("model.safetensors", b""), "a header of 0 in -8 bytes"),
        (_file("model.safetensors", b"\xff" * 64), "a header of 18446744073709551615"),
        (_file("adapter_config.json", b"{}"), "an adapter"),
        (_file("config.json", b"[" * 10**5), "not JSON"),
        (_file("tokenizer.json", b"{}"), "could not be loaded"),
    ],
)
def test_what_is_refused(change: Callable[[Path], None], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    """Official OpenELM folders have such an `auto_map`; the model loads all the same."""
    code = f"import os\nos.mkdir({str(tmp_path / 'touched')!r})\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (folder / name).write_text(code)
    classes = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    _set("config.json", auto_map=classes)(folder)
    _set("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.T"]})(folder)
    model, _ = load(folder)
    assert type(model).__module__.startswith("transformers.")
    _set("config.json", model_type="evil")(folder)
    with pytest.raises(ValueError, match="could not be loaded"):
        load(folder)
    assert not (tmp_path / "touched").exists()
