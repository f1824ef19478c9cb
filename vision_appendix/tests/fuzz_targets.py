"""The readers of CIFAR-10 under fire; see `run_store.tests.fuzzing`."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from random import Random

import safetensors.torch
import torch

from run_store.tests.fuzzing import Canary, Reader, Target
from run_store.tests.mutations import mutate_bytes
from vision_appendix.configs import DataConfig
from vision_appendix.imbalanced_cifar10 import load_images
from vision_appendix.last_layer import LAST_LAYER, read_last_layer

_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]


class _Code:
    """What a hostile pickle does: it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _archive(batch: bytes, *, links: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in _NAMES:
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(batch)
            if links:
                member.type, member.size = tarfile.SYMTYPE, 0
                member.linkname = f"../../{name}" if name != "test_batch" else "/etc/passwd"
            archive.addfile(member, io.BytesIO(batch))
        long = tarfile.TarInfo("x" * 300 + "/é")
        archive.addfile(long)
    return buffer.getvalue()


def _mutate(content: bytes, random: Random) -> bytes:
    data = bytearray(mutate_bytes(content, random))
    for at in range(0, len(data) - 511, 512):  # right checksums, so that headers are read
        header = data[at : at + 512]
        if header[257:262] == b"ustar" and random.random() < 0.9:
            header[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


def _archives() -> list[bytes]:
    return [
        _archive(pickle.dumps({b"data": b"\0" * 300, b"labels": [1]})),
        _archive(b"", links=True),
    ]


def _batch() -> list[bytes]:
    return [pickle.dumps({b"data": b"\0" * 300, b"labels": [1, 2]}, protocol=2)]


def _reader(folder: Path) -> Reader:
    canary = Canary(folder / "canary")
    data = folder / "data"
    data.mkdir()
    config = DataConfig(dataset="cifar10", data_dir=data)

    def read(content: bytes) -> None:
        for path in data.iterdir():
            path.unlink()
        # The length chooses the compression, so that an input always does the same.
        suffix, pack = _PACKERS[len(content) // 7 % 3]
        (data / f"cifar-10-python.tar{suffix}").write_bytes(pack(content))
        try:
            load_images(config)
        finally:
            canary.check("")

    with contextlib.suppress(ValueError):
        read(_archive(pickle.dumps(_Code(canary.touched))))
    return read


def _batches(folder: Path) -> Reader:
    """Batches lie there unpacked, and are not the original's."""
    canary = Canary(folder / "canary")
    data = folder / "data" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    for name in _NAMES:
        (data / name).write_bytes(pickle.dumps(_Code(canary.touched)))
    config = DataConfig(dataset="cifar10", data_dir=data.parent)

    def read(content: bytes) -> None:
        (data / "data_batch_1").write_bytes(content)
        try:
            load_images(config)
        finally:
            canary.check("")

    return read


def _layers() -> list[bytes]:
    layer = {
        "classifier": torch.ones(3, 2),
        "class_means": torch.ones(3, 2),
        "within_class_variance": torch.ones(3),
    }
    return [
        safetensors.torch.save(layer),
        safetensors.torch.save({name: value.to(torch.bfloat16) for name, value in layer.items()}),
    ]


def _layer_reader(folder: Path) -> Reader:
    def read(content: bytes) -> None:
        (folder / LAST_LAYER).write_bytes(content)
        read_last_layer(folder, 3)

    return read


_PACKERS = (
    ("", bytes),
    (".gz", lambda content: gzip.compress(content, 1)),
    (".xz", lambda content: lzma.compress(content, preset=0)),
)
_MODULES = ("vision_appendix.imbalanced_cifar10", "tarfile")
TARGETS = [
    Target("cifar-10-python.tar", _archives, _reader, "data", _mutate, _MODULES, refused=True),
    Target("data_batch_1", _batch, _batches, "data_batch_1", modules=_MODULES, refused=True),
    Target(LAST_LAYER, _layers, _layer_reader, LAST_LAYER, modules=("vision_appendix.last_layer",)),
]
