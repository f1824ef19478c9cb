"""The data: counts kept, subsets nested, the original batches held against their md5."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vision_appendix import recipes
from vision_appendix.configs import PAPER_COUNTS, DataConfig, RunConfig, parse_imbalance
from vision_appendix.imbalanced_cifar10 import (
    DIGITS_TEST_IMAGES,
    LabelledImages,
    _BatchUnpickler,
    _read_originals,
    load_images,
    resolve_counts,
)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return load_images(DataConfig())


def members(data: LabelledImages) -> set[bytes]:
    """Images are told apart by their pixels."""
    return {image.numpy().tobytes() for image in data.images}


def test_digits_are_whole_and_split(digits: LabelledImages) -> None:
    assert len(digits.images) + len(digits.test_images) == 1797
    assert torch.bincount(digits.test_labels).tolist() == [DIGITS_TEST_IMAGES] * 10
    assert digits.class_counts.min() == 114
    assert digits.images.shape[1:] == (8, 8, 1)
    assert digits.images.dtype == torch.uint8
    assert not members(digits) & {image.numpy().tobytes() for image in digits.test_images}
    pixels = digits.images.double()
    assert digits.pixel_mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert digits.pixel_std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)
    assert load_images(DataConfig()).data_hash == digits.data_hash


@given(
    small=st.lists(st.integers(1, 40), min_size=10, max_size=10),
    more=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_subsets_have_their_counts_and_are_nested(
    digits: LabelledImages, small: list[int], more: int, seed: int
) -> None:
    few, many = digits.subset(small, seed), digits.subset([n + more for n in small], seed)
    assert few.class_counts.tolist() == small
    assert members(few) <= members(many) <= members(digits)
    assert torch.equal(few.pixel_mean, digits.pixel_mean)


def test_seeds_choose_other_images(digits: LabelledImages) -> None:
    assert members(digits.subset([5] * 10, 0)) != members(digits.subset([5] * 10, 1))


def test_named_imbalances() -> None:
    assert RunConfig(imbalance="paper").counts(5000, 10) == PAPER_COUNTS
    assert RunConfig(imbalance="balanced").counts(5000, 3) == (5000,) * 3
    assert RunConfig(imbalance="balanced:0.5").counts(11, 3) == (5,) * 3
    assert RunConfig(imbalance="exponential:0.01").counts(1000, 3) == (10, 100, 1000)
    assert RunConfig(imbalance="step:0.1").counts(5000, 4) == (500, 500, 5000, 5000)
    assert RunConfig(imbalance="zipf:1").counts(120, 4) == (30, 40, 60, 120)
    assert RunConfig(imbalance="zipf:9").counts(10, 3) == (1, 1, 10)  # never an empty class
    assert RunConfig(class_counts=(3, 2)).counts(5, 2) == (3, 2)
    assert RunConfig(class_counts=(3, 2)).imbalance == "counts"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "zipf",
        "zipf:-1",
        "zipf:inf",
        "step:0",
        "step:2",
        "exponential:nan",
        "paper:1",
        "balanced:",
        "balanced:2",
    ],
)
def test_an_unknown_imbalance_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=f"imbalance '{spec}' is unknown"):
        parse_imbalance(spec)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((1,) * 9, "9 numbers; expected 10"),
        ((500, *(1,) * 9), "500 images of class '0'; expected at most 118"),
    ],
)
def test_counts_that_cannot_be_had_are_named(
    digits: LabelledImages, counts: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_counts(RunConfig(class_counts=counts), digits)


def test_the_digits_recipe_has_about_as_many_images_balanced_as_not(digits: LabelledImages) -> None:
    totals = {
        cell.imbalance: sum(resolve_counts(cell, digits)) for cell in recipes.digits().cells()
    }
    assert totals == {"balanced:0.4": 450, "exponential:0.1": 461}


def test_shuffled_classes_permute_the_counts_by_seed(digits: LabelledImages) -> None:
    plain = resolve_counts(RunConfig(imbalance="paper"), digits)
    shuffled = [
        resolve_counts(RunConfig(imbalance="paper", shuffle_classes=True, seed=seed), digits)
        for seed in (0, 0, 1)
    ]
    assert plain == tuple(sorted(plain))
    assert [sorted(counts) for counts in shuffled] == [list(plain)] * 3
    assert shuffled[0] == shuffled[1] != shuffled[2]


# ---- CIFAR-10


def test_a_folder_without_the_batches_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} holds no CIFAR-10"):
            load_images(DataConfig(dataset="cifar10", data_dir=folder))


def test_corrupted_batches_are_named_and_never_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    config = DataConfig(dataset="cifar10", data_dir=tmp_path)
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        load_images(config)
    for name in [*(f"data_batch_{i}" for i in range(2, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_1 has the md5"):
        load_images(config)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
@pytest.mark.parametrize("end", ["tar.gz", "tgz"])
def test_a_damaged_archive_is_named(content: bytes | None, end: str, tmp_path: Path) -> None:
    path = tmp_path / f"cifar-10-python.{end}"
    if content is None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
        content = buffer.getvalue()
    path.write_bytes(content)
    for place in (tmp_path, path):
        with pytest.raises(ValueError, match=rf"{end}(: cut short or no| does not hold)"):
            load_images(DataConfig(dataset="cifar10", data_dir=place))


@pytest.mark.parametrize("end", ["tar.gz", "tgz", "tar.xz", "txz", "tar.bz2", "tar"])
def test_an_archive_is_unpacked_by_its_ending(end: str, tmp_path: Path) -> None:
    packed = tmp_path / f"cifar-10-python.{end}"
    kind = {"tar": "", "tgz": "gz", "txz": "xz"}.get(end, end.removeprefix("tar."))
    with tarfile.open(packed, mode=f"w:{kind}") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/a")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"bytes"))
    assert _read_originals(tmp_path, ["a"]) == {"a": b"bytes"}


def test_a_batch_may_hold_arrays_and_nothing_else() -> None:
    array = pickle.dumps({b"data": np.arange(3, dtype=np.uint8)}, protocol=2)
    array = array.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(KeyError, match="encode"):  # Python 3 writes bytes through a codec
        _BatchUnpickler(array).load()
    with pytest.raises(KeyError, match="system"):
        _BatchUnpickler(b"cos\nsystem\n(S'true'\ntR.").load()


def test_an_archive_that_unpacks_to_very_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vision_appendix.imbalanced_cifar10._MOST_ARCHIVE", 2**20)
    with lzma.open(tmp_path / "cifar-10-python.tar.xz", "wb", preset=0) as file:
        member = tarfile.TarInfo("cifar-10-batches-py/else")
        member.size = 2**21
        file.write(member.tobuf() + bytes(2**21))
    with pytest.raises(ValueError, match="unpacks to more than CIFAR-10"):
        load_images(DataConfig(dataset="cifar10", data_dir=tmp_path))


def test_a_member_that_ends_far_away_is_not_read_up_to(tmp_path: Path) -> None:
    member = tarfile.TarInfo("cifar-10-batches-py/else")
    member.size = 2**60
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "cifar-10-python.tar").write_bytes(header + header)
    with pytest.raises(ValueError, match="unpacks to more than CIFAR-10"):
        load_images(DataConfig(dataset="cifar10", data_dir=tmp_path))
