"""The images: CIFAR-10 or scikit-learn's digits, whole and as a subset of given class counts.

N images of H x W pixels and C channels, kept as uint8 on the device; V classes.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from run_store.input_files import open_regular, read_file
from vision_appendix.configs import DataConfig, RunConfig

# The original's batches have 31 MB, its archive 186 MB when it is unpacked.
_MOST_BATCH, _MOST_ARCHIVE = 2**26, 2**28
DIGITS_TEST_IMAGES = 60  # of each class; the rarest digit keeps 114 for training


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Training and test images with their classes."""

    images: UInt8[Tensor, "N H W C"]
    labels: Int64[Tensor, " N"]
    test_images: UInt8[Tensor, "M H W C"]
    test_labels: Int64[Tensor, " M"]
    pixel_mean: Float[Tensor, " C"]
    """Of all training images, before any were left out; 0..255."""
    pixel_std: Float[Tensor, " C"]
    class_names: tuple[str, ...]
    data_hash: str

    @cached_property
    def class_counts(self) -> Int64[Tensor, " V"]:
        """Training images of each class."""
        return torch.bincount(self.labels.cpu(), minlength=len(self.class_names))

    def to(self, device: torch.device) -> LabelledImages:
        """The same, on a device."""
        tensors = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def check(self, class_counts: Sequence[int]) -> None:
        """Raises ValueError if a class has fewer training images than asked for."""
        available = self.class_counts.tolist()
        for count, most, name in zip(class_counts, available, self.class_names, strict=True):
            if count > most:
                found = f"class_counts asks for {count} images of class {name!r}"
                raise ValueError(f"{found}; expected at most {most}")

    def subset(self, class_counts: Sequence[int], seed: int) -> LabelledImages:
        """Keep `class_counts` training images of each class, chosen by the seed.

        Nested: of one seed, the images kept of a class at a smaller count are among those kept at
        a larger one. Raises ValueError if a class has fewer images than asked for.
        """
        self.check(class_counts)
        labels = self.labels.cpu().numpy()
        kept = [
            np.random.default_rng((seed, k)).permutation(np.flatnonzero(labels == k))[:count]
            for k, count in enumerate(class_counts)
        ]
        index = torch.from_numpy(np.sort(np.concatenate(kept))).to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])


def resolve_counts(config: RunConfig, data: LabelledImages) -> tuple[int, ...]:
    """The training images of each class in a run, in the order of the classes.

    The config gives them rarest first and, unless the seed shuffles, class by class (the paper's
    order). Raises ValueError if they are not one for each class, or a class has too few images.
    """
    counts = config.counts(int(data.class_counts.min()), len(data.class_names))
    if config.shuffle_classes:
        order = np.random.default_rng((config.seed, len(counts))).permutation(len(counts))
        counts = tuple(counts[i] for i in order)
    data.check(counts)
    return counts


def load_images(config: DataConfig) -> LabelledImages:
    """The whole set. Raises ValueError for a folder without it or a batch that is not the original.

    CIFAR-10 is read from `data_dir`: the extracted batches or their archive, or the archive itself,
    held against the md5s that torchvision knows; without it torchvision downloads them into
    `cache_dir`.
    """
    if config.dataset == "digits":
        if config.data_dir is not None:
            raise ValueError(f"data_dir is {config.data_dir}; expected none with dataset digits")
        return _digits()
    folder = config.data_dir or _download(config.cache_dir / "cifar10")
    return _cifar10(folder)


def _digits() -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels of 17 greys."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]
    test = np.zeros(len(images), dtype=bool)
    for k in range(10):
        members = np.flatnonzero(digits.target == k)
        test[np.random.default_rng(k).permutation(members)[:DIGITS_TEST_IMAGES]] = True
    labels = digits.target.astype(np.int64)
    names = tuple(str(name) for name in digits.target_names)
    return _labelled(images[~test], labels[~test], images[test], labels[test], names)


def _cifar10(folder: Path) -> LabelledImages:
    from torchvision.datasets import CIFAR10

    known = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    known[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    contents = _read_originals(folder, list(known))
    for name, md5 in known.items():
        found = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(f"{folder}: {name} has the md5 {found}; expected {md5}, the original")
    batches = {name: _BatchUnpickler(content).load() for name, content in contents.items()}

    def join(names: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.concatenate([batches[name][b"data"] for name, _ in names])
        labels = np.concatenate([batches[name][b"labels"] for name, _ in names])
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)

    class_names = batches[CIFAR10.meta["filename"]][b"label_names"]
    names = tuple(name.decode("ascii") for name in class_names)
    return _labelled(*join(CIFAR10.train_list), *join(CIFAR10.test_list), names)


def _read_originals(folder: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of the original files, extracted or still in their archive."""
    for place in (folder / "cifar-10-batches-py", folder):
        if (place / names[0]).is_file():
            return {name: read_file(place / name, most_bytes=_MOST_BATCH) for name in names}
    archives = [folder] if folder.is_file() else sorted(folder.glob("cifar-10-python.t*"))
    if not archives:
        raise ValueError(
            f"{folder} holds no CIFAR-10; expected the folder cifar-10-batches-py "
            "or the archive cifar-10-python.tar.gz in it, or that archive"
        )
    try:
        contents = _read_archive(archives[0], names)
    except Exception as error:  # of many kinds, by the compression
        raise ValueError(f"{archives[0]}: cut short or no archive: {error}") from None
    if missing := [name for name in names if name not in contents]:
        raise ValueError(f"{archives[0]} does not hold {missing[0]}")
    return contents


def _read_archive(path: Path, names: list[str]) -> dict[str, bytes]:
    unpackers = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open}
    unpackers |= {".bz2": bz2.open, ".tbz2": bz2.open}
    unpack = unpackers.get(path.suffix, lambda packed, _: packed)
    contents: dict[str, bytes] = {}
    with (
        open(path, "rb", opener=open_regular) as packed,
        unpack(packed, "rb") as file,
        # A stream, so that no more is unpacked than what the original holds.
        tarfile.open(fileobj=_Limited(file, _MOST_ARCHIVE), mode="r|") as archive,
    ):
        for member in archive:
            if archive.offset > _MOST_ARCHIVE:  # where the next is, which a stream reads up to
                raise ValueError("it unpacks to more than CIFAR-10")
            name = Path(member.name).name
            if name in names and member.isreg() and member.size <= _MOST_BATCH:
                contents[name] = archive.extractfile(member).read()
    return contents


class _Limited:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self._file, self._left = file, most_bytes

    def read(self, size: int) -> bytes:
        content = self._file.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError("it unpacks to more than CIFAR-10")
        return content


def _download(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(folder), download=True)
    except RuntimeError as error:  # what torchvision raises for a download that is not whole
        raise ValueError(f"CIFAR-10 could not be downloaded into {folder}: {error}") from None
    return folder


class _BatchUnpickler(pickle.Unpickler):
    """Reads the original batches, whose md5 is known, and builds nothing but their arrays."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        return allowed[module, name]


def _labelled(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    class_names: tuple[str, ...],
) -> LabelledImages:
    arrays = [np.ascontiguousarray(a) for a in (images, labels, test_images, test_labels)]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    mean, std = _pixel_statistics(arrays[0])
    tensors = [torch.from_numpy(array) for array in arrays]
    return LabelledImages(
        images=tensors[0],
        labels=tensors[1],
        test_images=tensors[2],
        test_labels=tensors[3],
        pixel_mean=torch.from_numpy(mean).float(),
        pixel_std=torch.from_numpy(std).float(),
        class_names=class_names,
        data_hash=digest.hexdigest()[:16],
    )


def _pixel_statistics(images: UInt8[np.ndarray, "N H W C"]) -> tuple[np.ndarray, np.ndarray]:
    """(C) mean and standard deviation, exact: 256 values and how often each occurs."""
    channels = [images[..., c].ravel() for c in range(images.shape[-1])]
    shares = np.stack([np.bincount(pixels, minlength=256) / len(pixels) for pixels in channels])
    values = np.arange(256.0)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean, np.sqrt(variance)
