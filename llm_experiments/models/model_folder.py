"""A model's folder that anyone may have written: what is checked before transformers reads it.

transformers runs no code of a folder without `trust_remote_code`, and reads safetensors, which hold
numbers alone. But it follows paths that the folder's files name, loads attention kernels that
config.json names, and builds a model of whatever size it states before it looks at the weights.

What it does not open (states of a training, weights in other formats, results) is not looked at.

Not defended: a tokenizer whose patterns take very long on some text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from run_store.input_files import is_number, open_regular, parse_json, read_file

_MOST_JSON_BYTES, _MOST_HEADER_BYTES, _MOST_TOKENIZER_BYTES = 2**26, 10**8, 2**29
_MOST_SIZE = 2**24  # of any dimension; the context of some models is 10 million
_MOST_BUFFER_NUMBERS = 2**28
# The base of RoPE and scaling factors are no sizes.
_MOST_LAYERS = 2**12
_NO_SIZES = ("theta", "base", "scal", "factor", "flos", "time_step_limit")
ADAPTER = "adapter_config.json"
_ATTENTIONS = (None, "eager", "sdpa")
_TOKENIZERS = ("tokenizer.json", "vocab", ".model", ".spm")  # in the names of its files
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Of these none is opened for a tokenizer.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ot", ".msgpack", ".h5", ".onnx", ".gguf"),
    *(".npz", ".data", ".onnx_data", ".nemo", ".tflite", ".mlmodel", ".zip", ".gz", ".tar"),
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the safetensors of a folder hold."""

    tensors: int
    num_bytes: int


def check_model_folder(folder: Path) -> Weights:
    """The weights that a folder in transformers' format holds.

    Raises:
        ValueError: no such folder; a file in it that is not what its name says; a path out of it;
            an adapter, a quantised model, or a choice of code that is not transformers' own.
    """
    if (folder / ADAPTER).exists():
        raise ValueError(f"{str(folder)!r} holds an adapter; expected a whole model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is not a checkpoint; expected a folder with config.json")
    _check_config(read_config(folder), folder / "config.json")
    if os.path.lexists(generation := folder / "generation_config.json"):
        _json(generation)
    shards = _shards(folder)
    tensors = sum(_tensors(folder / name) for name in shards)
    sizes = sum((folder / name).stat().st_size for name in shards)
    return Weights(tensors=tensors, num_bytes=sizes)


def check_adapter_folder(folder: Path) -> tuple[Weights, str]:
    """What the safetensors of a PEFT adapter hold, and the name of the model that it belongs to.

    Raises:
        ValueError: another format, no base model, or a setting that has code imported.
    """
    config, path = _json(folder / ADAPTER), folder / "adapter_model.safetensors"
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / ADAPTER}: base_model_name_or_path is {base!r:.80}")
    for name in ("megatron_config", "corda_config", "lora_ga_config"):
        if config.get(name) is not None:
            raise ValueError(f"{folder / ADAPTER}: {name} is set; expected an adapter without code")
    if not path.exists():
        raise ValueError(f"{str(folder)!r} holds an adapter without {path.name}; expected one")
    return Weights(tensors=_tensors(path), num_bytes=path.stat().st_size), base


def check_tokenizer_folder(folder: Path) -> None:
    """ValueError where what is opened for the tokenizer is not what its name says, or not there.

    Of a folder with tokenizer.json that is this file alone, which tokenizers parses.
    """
    path = folder / "tokenizer.json"
    files = [path] if os.path.lexists(path) else [*folder.iterdir()]
    if not any(part in path.name for path in files for part in _TOKENIZERS):
        raise ValueError(f"{str(folder)!r} holds no tokenizer; expected tokenizer.json or its like")
    for path in files:
        if path.suffix in _WEIGHTS or path.is_dir():
            continue
        if not path.is_file():
            raise ValueError(f"{path} is neither file nor folder")
        if path.stat().st_size > _MOST_TOKENIZER_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; only weights are that large")
        if path.name in _TOKENIZER_SETTINGS:
            values = _json(path)
            if path.name == "tokenizer_config.json":
                _check_names(values, path)


def weights_hash(folder: Path) -> str:
    """What tells a checkpoint from another, for the run's id: a hash of its config and weights.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    check_model_folder(folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _hash(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@functools.lru_cache(maxsize=4)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, size in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} ".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def no_larger_than(weights: Weights) -> Iterator[None]:
    """While a model is built: ValueError as soon as it outgrows its weights.

    It may have eight times as many parameters, since some files join those of many modules, and
    two numbers a byte, since input and output matrix may be tied.
    """
    parameters: dict[tuple[int, str], int] = {}
    buffers: dict[tuple[int, str], int] = {}

    def check(numbers: dict[tuple[int, str], int], most: int, most_numbers: int) -> None:
        if len(numbers) > most or sum(numbers.values()) > most_numbers:
            held = f"{weights.tensors} tensors in {weights.num_bytes} bytes"
            raise ValueError(f"config.json states a model much larger than its weights ({held})")

    most = 8 * weights.tensors + 64

    def on_parameter(owner: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            parameters[id(owner), name] = parameter.numel()
            check(parameters, most, 2 * weights.num_bytes)

    def on_buffer(owner: nn.Module, name: str, buffer: Tensor | None) -> None:
        if buffer is not None:
            buffers[id(owner), name] = buffer.numel()
            check(buffers, 4 * most, _MOST_BUFFER_NUMBERS)

    def on_module(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        modules.append(name)
        if len(modules) > 16 * most:
            check(parameters, -1, 0)

    modules: list[str] = []
    handles = (
        registration.register_module_parameter_registration_hook(on_parameter),
        registration.register_module_buffer_registration_hook(on_buffer),
        registration.register_module_module_registration_hook(on_module),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says; ValueError where it is none."""
    path = folder / "config.json"
    # transformers writes infinite bounds so.
    return parse_json(read_file(path, most_bytes=_MOST_JSON_BYTES), str(path), infinity=True)


def _json(path: Path) -> dict[str, Any]:
    return parse_json(read_file(path, most_bytes=_MOST_JSON_BYTES), str(path))


def _check_config(config: dict[str, Any], path: Path) -> None:
    known = _names_read(config.get("model_type"))
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else ((name, item) for item in value)
            rest.extend(inner)
        # Configs make a list as long before there is a model to measure.
        most = _MOST_LAYERS if "layer" in name else _MOST_SIZE
        sized = (known is None or name in known) and not any(part in name for part in _NO_SIZES)
        if sized and is_number(value) and abs(value) > most:
            raise ValueError(f"{path}: {name} is {value}; expected at most {most}")
        if name in ("quantization_config", "transformers_weights") and value is not None:
            raise ValueError(f"{path}: {name} is set; expected a model as it was trained")
        if "attn_implementation" in name or "experts_implementation" in name:
            inner_values = value.values() if isinstance(value, dict) else (value,)
            if "autoset" not in name and any(inner not in _ATTENTIONS for inner in inner_values):
                raise ValueError(f"{path}: {name} is {value!r:.80}; expected eager or sdpa")


def _names_read(model_type: object) -> set[str] | None:
    """What a config of this type reads; the rest are notes. None where the type is not known."""
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    names: set[str] = set()
    kinds = [CONFIG_MAPPING[model_type]]
    while kinds:
        kind = kinds.pop()
        names |= {*dir(kind), *inspect.signature(kind).parameters, *kind.attribute_map}
        kinds += [part for part in kind.sub_configs.values() if isinstance(part, type)]
    return names


def _check_names(values: dict[str, Any], path: Path) -> None:
    """transformers opens what tokenizer_config.json names, but for a name that older ones wrote."""
    for name, value in values.items():
        legacy = name == "special_tokens_map_file"
        if name.endswith("_file") and isinstance(value, str) and not legacy:
            raise ValueError(f"{path}: {name} is {value!r:.80}; expected files by their own names")
        if name == "fast_tokenizer_files" and "/" in str(value):
            raise ValueError(f"{path}: {name} is {value!r:.80}; expected files of the folder")


def _shards(folder: Path) -> list[str]:
    """The names of the safetensors, all in the folder itself."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        raise ValueError(f"{str(folder)!r} holds no model.safetensors; expected one")
    index = _json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{path}: no weight_map or no metadata")
    for name in names.values():
        plain = isinstance(name, str) and os.path.basename(name) == name
        if not plain or not name.endswith(".safetensors") or name.startswith("."):
            raise ValueError(f"{path}: {name!r:.80} is not the name of a .safetensors file")
    return sorted(set(names.values()))


def _tensors(path: Path) -> int:
    """How many tensors a safetensors file states; safetensors itself checks where they lie."""
    with open(path, "rb", opener=open_regular) as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        left = os.fstat(file.fileno()).st_size - 8
        if not 2 <= size <= min(left, _MOST_HEADER_BYTES):
            raise ValueError(f"{path}: not safetensors: a header of {size} in {left} bytes")
        return len(parse_json(file.read(size), str(path)))
