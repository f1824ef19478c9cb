"""classes.nc from hostile hands: its HDF5 is whole, and means harm."""

from __future__ import annotations

import io
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from run_store.records import from_bytes, record_bytes
from run_store.tests.test_runs import record

SECRET = 4242424242


def altered(alter: Callable[[h5py.File], None]) -> bytes:
    buffer = io.BytesIO(record_bytes(record()))
    with h5py.File(buffer, "r+") as file:
        alter(file)
    return buffer.getvalue()


@given(st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_the_reader_agrees_with_xarrays(num_classes: int, seed: int) -> None:
    """h5netcdf reads through HDF5's C library, `from_bytes` without it."""
    content = record_bytes(record(num_classes, seed))
    ours = from_bytes(content)
    with xr.open_dataset(io.BytesIO(content), engine="h5netcdf", decode_cf=False) as theirs:
        assert set(theirs.variables) == set(ours.variables)
        for name, variable in theirs.variables.items():
            assert variable.dims == ours[name].dims
            assert name == "label" or variable.dtype == ours[name].dtype
            np.testing.assert_array_equal(variable.values, ours[name].values)
        assert theirs["loss"].attrs["units"] == ours["loss"].attrs["units"]


@given(st.lists(st.sampled_from(["a", "\\", "\0", "x00", "\\x00", "Ġ", ""]), min_size=1))
@settings(deadline=None)
def test_labels_of_escapes_come_back(labels: list[str]) -> None:
    content = record_bytes(record(len(labels), labels=labels))
    assert from_bytes(content)["label"].values.tolist() == labels


@pytest.mark.parametrize("stored", ["a\\", "\\0", "\\x41", "\n", "\\q", "a\\x0"])
def test_labels_that_are_no_escape_are_refused(stored: str) -> None:
    def alter(file: h5py.File) -> None:
        file["label"][:2] = [stored, "x00b"]

    with pytest.raises(ValueError, match="not a class record"):
        from_bytes(altered(alter))


def test_some_variables_of_a_record() -> None:
    whole = record()
    some = from_bytes(record_bytes(whole), only=("loss", "final_count", "test_loss"))
    assert set(some.variables) == {"label", "step", "loss", "final_count"}
    for name, variable in some.variables.items():
        np.testing.assert_array_equal(variable.values, whole[name].values)


def test_chunks_that_do_not_divide_the_shape(tmp_path: Path) -> None:
    loss = np.random.default_rng(0).random((7, 3001))
    ones = np.ones((7, 3001), dtype=int)
    dataset = record(
        3001, steps=range(7), count=ones, loss=loss, accuracy=loss, class_counts=ones[0]
    )
    content = record_bytes(dataset)
    with h5py.File(io.BytesIO(content)) as file:
        chunks = file["loss"].chunks
        assert any(size % chunk for size, chunk in zip(loss.shape, chunks, strict=True))
    np.testing.assert_array_equal(from_bytes(content)["loss"].values, loss)


def _external_values(secret: Path) -> Callable[[h5py.File], None]:
    def alter(file: h5py.File) -> None:
        del file["final_count"]
        file.create_dataset("final_count", (4,), "i8", external=[(str(secret), 0, 32)])

    return alter


def _external_link(secret: Path) -> Callable[[h5py.File], None]:
    def alter(file: h5py.File) -> None:
        del file["final_count"]
        file["final_count"] = h5py.ExternalLink(str(secret) + ".h5", "secret")

    return alter


def _virtual(secret: Path) -> Callable[[h5py.File], None]:
    def alter(file: h5py.File) -> None:
        del file["final_count"]
        layout = h5py.VirtualLayout((4,), "i8")
        layout[:] = h5py.VirtualSource(str(secret) + ".h5", "secret", (4,))
        file.create_virtual_dataset("final_count", layout)

    return alter


@pytest.mark.parametrize("way", [_external_values, _external_link, _virtual])
def test_no_value_comes_from_another_file(
    way: Callable[[Path], Callable[[h5py.File], None]], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    values = np.full(4, SECRET)
    secret.write_bytes(values.tobytes())
    with h5py.File(f"{secret}.h5", "w") as file:
        file["secret"] = values
    content = altered(way(secret))
    (tmp_path / "classes.nc").write_bytes(content)
    with h5py.File(tmp_path / "classes.nc") as file:  # the trap is set: HDF5 walks into it
        assert list(file["final_count"]) == [SECRET] * 4
    with pytest.raises(ValueError, match="not a class record") as caught:
        from_bytes(content)
    assert str(SECRET) not in str(caught.value)


def _replaced(file: h5py.File, name: str, shape: tuple[int, ...], **storage: object) -> None:
    del file[name]
    file.create_dataset(name, shape, "f8", **storage)


def _sequences_of_sequences(file: h5py.File) -> None:
    nested = h5py.h5t.vlen_create(h5py.h5t.vlen_create(h5py.h5t.NATIVE_INT64))
    h5py.h5a.create(file["loss"].id, b"endless", nested, h5py.h5s.create_simple((1,)))


HOSTILE: dict[str, Callable[[h5py.File], None]] = {
    "a petabyte declared": lambda f: _replaced(f, "loss", (2**24, 2**24), chunks=(1024, 1024)),
    "more declared than stored": lambda f: _replaced(
        f, "loss", (3, 4), chunks=(1, 4), shuffle=True, compression="gzip"
    ),
    "a filter that is not ours": lambda f: _replaced(f, "loss", (3, 4), fletcher32=True),
    "one filter short": lambda f: _replaced(f, "loss", (3, 4), compression="gzip"),
    "no filters": lambda f: _replaced(f, "loss", (3, 4)),
    "another dtype": lambda f: _replaced(f, "count", (3, 4)),
    "a link to itself": lambda f: (f.pop("loss"), f.__setitem__("loss", h5py.SoftLink("/loss"))),
    "a group": lambda f: (f.pop("loss"), f.create_group("loss")),
    "a thousand names": lambda f: [f.__setitem__(f"x{i}_loss", f["loss"]) for i in range(1000)],
    "sequences of sequences": _sequences_of_sequences,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whole_hdf5_that_means_harm(name: str) -> None:
    content = altered(HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match="not a class record") as caught:
        from_bytes(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
    assert "UnboundLocalError" not in str(caught.value)


def test_an_attribute_that_claims_to_be_long_is_not_believed() -> None:
    content = record_bytes(record())
    entry = (1).to_bytes(4, "little") + content.find(b"GCOL").to_bytes(8, "little")
    assert content.count(entry) > 5  # a list of one dimension each
    claimed = (2**26).to_bytes(4, "little") + entry[4:]
    tracemalloc.start()
    with pytest.raises(ValueError, match="an attribute of 67108864 values"):
        from_bytes(content.replace(entry, claimed))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_bomb_in_a_chunk_is_not_inflated() -> None:
    content = record_bytes(record())
    with h5py.File(io.BytesIO(content)) as file:
        chunk = file["loss"].id.get_chunk_info(0)
    bomb = zlib.compress(bytes(2**26), 9)
    # At the end of the file, where the index of chunks now points.
    old = chunk.size.to_bytes(4, "little") + bytes(4)
    places = [i for i in range(len(content)) if content.startswith(old, i)]
    address = chunk.byte_offset.to_bytes(8, "little")
    (place,) = (i for i in places if content.find(address, i, i + 48) >= 0)
    at = content.find(address, place)
    changed = bytearray(content + bomb)
    changed[place : place + 4] = len(bomb).to_bytes(4, "little")
    changed[at : at + 8] = len(content).to_bytes(8, "little")
    tracemalloc.start()
    with pytest.raises(ValueError, match="chunk of another size"):
        from_bytes(bytes(changed))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_labels_that_share_one_long_text_are_refused() -> None:
    content = bytearray(record_bytes(record(2000, labels=["x" * 5000] + ["y"] * 1999)))
    with h5py.File(io.BytesIO(bytes(content))) as file:
        offset = file["label"].id.get_offset()
    for place in range(offset, offset + 2000 * 16, 16):
        content[place : place + 16] = content[offset : offset + 16]
    with pytest.raises(ValueError, match="share their text"):
        from_bytes(bytes(content))
