"""The readers of corpora, caches and models under fire; see `run_store.tests.fuzzing`."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
import transformers
from pyarrow import parquet as pq

from llm_experiments.audit import load
from llm_experiments.configs import DataConfig
from llm_experiments.models.openelm import OpenELMConfig
from llm_experiments.models.starting_point import load_weights
from llm_experiments.text.corpora import load_corpus
from llm_experiments.text.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.text.tokenization import SPECIAL_TOKENS, train_tokenizer
from run_store.tests.fuzzing import Canary, Reader, Target
from run_store.tests.mutations import (
    mutate_bytes,
    mutate_in_place,
    mutate_json,
    with_header,
)

transformers.logging.set_verbosity(logging.CRITICAL)
transformers.utils.logging.disable_progress_bar()
_TEXT = "\n\n".join(f"word{i % 7} and word{i % 5} again {i}" for i in range(40))
_WIDTHS = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


# ---- the cache


@functools.cache
def _prepared() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.txt").write_text(_TEXT)
        data = DataConfig(
            corpus="text", data_dir=Path(folder), vocab_size=261, context=8, cache_dir=Path(folder)
        )
        return {p.name: p.read_bytes() for p in prepare(data).folder.iterdir() if p.is_file()}


def _cache_reader(name: str) -> Callable[[Path], Reader]:
    """A file of an entry, whose hash meta.json agrees with."""

    def make(folder: Path) -> Reader:
        files = _prepared()
        entry = folder / "entry"
        entry.mkdir()
        for other, content in files.items():
            (entry / other).write_bytes(content)
        meta = json.loads(files["meta.json"])

        def read(content: bytes) -> None:
            (entry / name).write_bytes(content)
            if name != "meta.json":
                meta["sha256"][name] = hashlib.sha256(content).hexdigest()
                (entry / "meta.json").write_text(json.dumps(meta))
            corpus = load_prepared(entry)
            assert int(corpus.class_counts.sum()) <= corpus.tokens.size
            assert all(isinstance(label, str) for label in corpus.labels)
            assert len(corpus.labels) == corpus.vocab_size

        return read

    return make


def _arrays() -> list[bytes]:
    seeds = []
    for dtype, order in (("u2", "C"), ("i8", "F"), ("u1", "C")):
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(np.arange(24).reshape(3, 8) % 200, dtype=dtype, order=order))
        seeds.append(buffer.getvalue())
    return seeds


# ---- corpora


def _text_reader(folder: Path) -> Reader:
    canary = Canary(folder / "canary")
    data = folder / "data"
    data.mkdir()
    config = DataConfig(corpus="text", data_dir=data)

    def read(content: bytes) -> None:
        (data / "a.txt").write_bytes(content)
        documents = load_corpus(config)
        assert all(isinstance(document, str) for document in documents)
        canary.check("")

    return read


def _parquets() -> list[bytes]:
    seeds = []
    texts = ["a review", None, "another é", "x" * 50] * 5
    for compression, dictionary in (("snappy", True), ("zstd", False), ("none", False)):
        table = pa.table({"text": texts, "label": list(range(20))})
        table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {}}}'})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression=compression, use_dictionary=dictionary)
        seeds.append(buffer.getvalue())
    return seeds


def _parquet_reader(folder: Path) -> Reader:
    path = folder / "train-00000-of-00001.parquet"
    config = DataConfig(corpus="imdb", data_dir=folder)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert all(isinstance(document, str) for document in load_corpus(config))

    return read


# ---- models


def _configs() -> dict[str, transformers.PreTrainedConfig]:
    openelm = {"model_dim": 16, "head_dim": 4, "num_transformer_layers": 2, "ffn_dim_divisor": 8}
    layers = {"num_hidden_layers": 1, "vocab_size": 270}
    return {
        "qwen2": transformers.Qwen2Config(**_WIDTHS, **layers, num_key_value_heads=1),
        "openelm": OpenELMConfig(vocab_size=270, **openelm),
        "gpt2": transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=270),
    }


@functools.cache
def _models() -> dict[str, dict[str, bytes]]:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer((), 261),
        **{f"{n}_token": t for n, t in zip(("bos", "pad", "eos"), SPECIAL_TOKENS, strict=False)},
    )
    models = {}
    for name, config in _configs().items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            models[name] = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    return models


def _model_files(name: str) -> Callable[[], list[bytes]]:
    return lambda: [files[name] for files in _models().values() if name in files]


def _model_reader(name: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        canary = Canary(folder / "canary")
        # What the folder's files may point to, and must not be run or read.
        code = f"import os; os.mkdir({str(canary.touched)!r})"
        places = {}
        for kind, files in _models().items():
            place = places[kind] = folder / kind / "checkpoint"
            place.mkdir(parents=True)
            for other, content in files.items():
                (place / other).write_bytes(content)
            (place / "modeling_evil.py").write_text(code)
        seeds = _model_files(name)()
        kinds = list(places)

        def read(content: bytes) -> None:
            # Beside which other files it lies is a function of the input.
            kind = kinds[seeds.index(content) if content in seeds else len(content) % len(kinds)]
            (places[kind] / name).write_bytes(content)
            try:
                model, tokenizer = load(places[kind])
                model(torch.tensor([[1, 2]]))
                tokenizer(["word1 and"], truncation=True, max_length=4)
            except ValueError as error:
                canary.check(str(error))
                raise
            finally:
                canary.check("")

        return read

    return make


def _start_reader(name: str) -> Callable[[Path], Reader]:
    """The same files as weights to start from."""

    def make(folder: Path) -> Reader:
        place = folder / "checkpoint"
        place.mkdir()
        for other, content in _models()["openelm"].items():
            (place / other).write_bytes(content)
        config = _configs()["openelm"]
        (place / "tokenizer.json").unlink()
        corpus = cast(PreparedCorpus, SimpleNamespace(vocab_size=270))

        def read(content: bytes) -> None:
            (place / name).write_bytes(content)
            model = transformers.AutoModelForCausalLM.from_config(config)
            load_weights(model, place, corpus)
            model(torch.tensor([[1, 2]]))

        return read

    return make


def _mutate_config(content: bytes, generator: random.Random) -> bytes:
    """Now and then with what is there to run code, or to read from elsewhere."""
    if generator.random() > 0.1:
        return mutate_json(content, generator)
    try:
        config: Any = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, generator)
    evil = {
        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
        "attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "evil"},
        "transformers_weights": "../../canary/secret",
        "_name_or_path": "../../canary",
        "num_hidden_layers": 2 ** generator.randrange(64),
        "model_type": generator.choice(("llama", "evil", "gpt2", "bert", "mamba", "t5")),
    }
    name = generator.choice(list(evil))
    if isinstance(config, dict):
        config[name] = evil[name]
    return json.dumps(config).encode()


def _index_reader(folder: Path) -> Reader:
    """model.safetensors.index.json, whose names transformers opens."""
    canary = Canary(folder / "canary")
    place = folder / "checkpoint"
    place.mkdir()
    for name, content in _models()["qwen2"].items():
        target = "shard.safetensors" if name == "model.safetensors" else name
        (place / target).write_bytes(content)
    shutil.copy(place / "shard.safetensors", folder / "outside.safetensors")

    def read(content: bytes) -> None:
        (place / "model.safetensors.index.json").write_bytes(content)
        load(place)
        names = json.loads(content)["weight_map"].values()
        assert not any("outside" in name for name in names), "a file outside was read"
        canary.check("")

    return read


def _indices() -> list[bytes]:
    content = _models()["qwen2"]["model.safetensors"]
    (size,) = struct.unpack("<Q", content[:8])
    names = [name for name in json.loads(content[8 : 8 + size]) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "shard.safetensors")}
    return [json.dumps(index).encode()]


def _mutate_index(content: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.1:
        outside = generator.choice((b"../outside.safetensors", b"./../outside.safetensors"))
        return content.replace(b"shard.safetensors", outside, generator.choice((1, 100)))
    return mutate_json(content, generator)


_CORPORA = ("llm_experiments.text.corpora",)
_CACHE = (
    "llm_experiments.text.preparation",
    "llm_experiments.text.tokenization",
    "numpy.lib._format_impl",
)
_MODEL = (
    "llm_experiments.models.model_folder",
    "llm_experiments.audit.checkpoints",
    "llm_experiments.models.openelm",
)
_mutate_weights = with_header(mutate_json)
TARGETS = [
    *(
        Target(f"cache {name}", seeds, _cache_reader(name), "entry", mutate, _CACHE)
        for name, seeds, mutate in (
            ("meta.json", lambda: [_prepared()["meta.json"]], mutate_json),
            ("tokens.npy", _arrays, mutate_bytes),
            ("tokenizer.json", lambda: [_prepared()["tokenizer.json"]], mutate_json),
        )
    ),
    Target(
        "corpus .txt", lambda: [_TEXT.encode(), b"a"], _text_reader, "data", mutate_bytes, _CORPORA
    ),
    Target("corpus .parquet", _parquets, _parquet_reader, "fuzz-", mutate_in_place, _CORPORA),
    *(
        Target(
            f"model {name}", _model_files(name), _model_reader(name), "checkpoint", mutate, _MODEL
        )
        for name, mutate in (
            ("config.json", _mutate_config),
            ("model.safetensors", _mutate_weights),
            ("tokenizer.json", mutate_json),
            ("tokenizer_config.json", _mutate_config),
        )
    ),
    *(
        Target(
            f"start {file}",
            lambda file=file: [_models()["openelm"][file]],
            _start_reader(file),
            "checkpoint",
            how,
            (*_MODEL, "llm_experiments.models.starting_point"),
        )
        for file, how in (("config.json", _mutate_config), ("model.safetensors", _mutate_weights))
    ),
    Target("model index.json", _indices, _index_reader, "checkpoint", _mutate_index, _MODEL),
]
