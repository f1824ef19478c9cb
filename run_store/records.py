"""The class record of a run: what it holds, and its bytes as netCDF4 (classes.nc).

h5netcdf writes it. pyfive reads it, in pure Python: HDF5's C library can loop for ever or crash on
bytes that were made to that end, and whoever makes them can make the manifest's SHA-256 agree.

What a reader is safe from, whatever the bytes: a crash, code, other files (external or virtual
storage, links), an endless walk through the file, and memory beyond about 1,032 times the file's
size, which is what DEFLATE can honestly reach. A file that is merely large takes its time.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import struct
import warnings
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyfive
import pyfive.dataobjects
import xarray as xr
from numpy.typing import ArrayLike, NDArray

FORMAT_VERSION = 1

_WINDOW = ("step", "class")
# Variable: its dimensions, its dtype and the count it is a mean over.
_VARIABLES: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "count": (_WINDOW, "int64", None),
    "loss": (_WINDOW, "float64", "count"),
    "accuracy": (_WINDOW, "float64", "count"),
    "class_count": (("class",), "int64", None),
    "label": (("class",), "object", None),
    "final_count": (("class",), "int64", None),
    "final_loss": (("class",), "float64", "final_count"),
    "final_accuracy": (("class",), "float64", "final_count"),
}

_MOST_VARIABLES = 200
_DEFLATE, _SHUFFLE = 1, 2
_DEFLATE_RATIO = 1032
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
_HEAP, _HEAP_OBJECT = struct.Struct("<4s4xQ"), struct.Struct("<H6xQ")


def class_record(
    *,
    steps: ArrayLike,
    class_counts: ArrayLike,
    labels: Sequence[str],
    count: ArrayLike,
    loss: ArrayLike,
    accuracy: ArrayLike,
    final_count: ArrayLike,
    final_loss: ArrayLike,
    final_accuracy: ArrayLike,
    **windows: ArrayLike,
) -> xr.Dataset:
    """The record of one run, as `Run.publish` takes it.

    T evaluation steps, V classes. `steps` (T,), increasing. `class_counts` (V,): training targets
    of each class. `count`, `loss`, `accuracy` (T, V): targets since the previous evaluation, their
    mean cross-entropy in nats and share of correct predictions, NaN where there was no target.
    `final_*` (V,): the same over the whole training set after the last step. Any further
    `windows` are (T, V) arrays too: a name that ends in ``_count`` counts, another is the mean
    over ``<prefix>_count`` (test_count, test_loss, test_accuracy).

    Raises ValueError where shapes, dtypes, signs or the place of NaN do not fit.
    """
    arrays = {
        "count": count,
        "loss": loss,
        "accuracy": accuracy,
        "class_count": class_counts,
        "final_count": final_count,
        "final_loss": final_loss,
        "final_accuracy": final_accuracy,
        **windows,
    }
    dataset = xr.Dataset(attrs={"format_version": FORMAT_VERSION})
    dataset["label"] = _strings(labels)
    dataset.coords["step"] = ("step", _integers("steps", steps))
    for name, values in arrays.items():
        dims, dtype, _ = _specification(name)
        array = _integers(name, values) if dtype == "int64" else np.asarray(values, dtype=dtype)
        if array.shape != (shape := tuple(dataset.sizes[dim] for dim in dims)):
            raise ValueError(f"{name} has the shape {array.shape}; expected {shape}, dims {dims}")
        dataset[name] = (dims, array, {"units": "nat"} if name.endswith("loss") else {})
    return validated(dataset)


def validated(dataset: xr.Dataset, *, whole: bool = True) -> xr.Dataset:
    """The dataset, if it is a class record; else ValueError with what is wrong.

    Not `whole`: variables may be missing, and a mean whose count is missing is not checked
    against it.
    """
    if dataset.attrs.get("format_version") != FORMAT_VERSION:
        version = dataset.attrs.get("format_version")
        raise ValueError(f"format_version is {version!r}; expected {FORMAT_VERSION}")
    missing = {*(_VARIABLES if whole else ("label",)), "step"} - set(dataset.variables)
    if missing:
        raise ValueError(f"no {sorted(missing)} in the class record")
    step = dataset["step"]
    if step.dims != ("step",) or step.dtype != np.int64 or not (np.diff(step.values) > 0).all():
        raise ValueError(f"step {step.values!r} is not an increasing int64 axis")
    for name in map(str, dataset.data_vars):
        dims, dtype, over = _specification(name)
        variable = dataset[name]
        if variable.dims != dims or variable.dtype != np.dtype(dtype):
            found = f"{variable.dtype} over {variable.dims}"
            raise ValueError(f"{name} is {found}; expected {dtype} over {dims}")
        if dtype == "int64" and (variable.values < 0).any():
            raise ValueError(f"{name} holds {variable.values.min()}; expected counts of at least 0")
        if over is not None and (whole or over in dataset.data_vars):
            if over not in dataset.data_vars:
                raise ValueError(f"{name} is a mean over {over}, which is missing")
            if not np.isnan(variable.values[dataset[over].values == 0]).all():
                raise ValueError(f"{name} has a value where {over} is 0; expected NaN")
        if name.endswith("accuracy") and ((variable < 0) | (variable > 1)).any():
            raise ValueError(f"{name} lies outside 0..1: {variable.values!r}")
    wrong = next((label for label in dataset["label"].values if not isinstance(label, str)), None)
    if wrong is not None:
        raise ValueError(f"label {wrong!r} is not a string")
    return dataset


def record_bytes(dataset: xr.Dataset) -> bytes:
    """A class record as netCDF4; equal arrays give equal bytes. Raises as `validated`.

    A label is stored as Python's `unicode_escape`, which is ASCII for every string.
    """
    stored = validated(dataset).copy()
    escaped = [label.encode("unicode_escape").decode("ascii") for label in stored["label"].values]
    stored["label"] = _strings(escaped)
    stored["label"].attrs["encoding"] = "unicode_escape"
    plain: dict[str, Any] = {"_FillValue": None}
    packed = plain | {"zlib": True, "complevel": 4, "shuffle": True}
    encoding = {
        name: packed if variable.dtype.kind in "if" and variable.size else plain
        for name, variable in stored.variables.items()
    }
    buffer = io.BytesIO()
    stored.to_netcdf(buffer, engine="h5netcdf", encoding=encoding)
    return buffer.getvalue()


class _Bounded(io.BytesIO):
    """Bytes that can be read a few times over and no more: ends every walk in circles."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._bytes_left = 64 * len(content) + 2**20
        self._calls_left = len(content) + 2**16

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._bytes_left -= len(content)
        self._calls_left -= 1
        if min(self._bytes_left, self._calls_left) < 0:
            raise ValueError("its parts refer to each other in circles")
        return content


class _Objects(pyfive.dataobjects.DataObjects):  # type: ignore[misc,unused-ignore]
    """Attributes that are not larger than the bytes that they come from."""

    def _attr_value(self, ptype: Any, buf: bytes, count: int, offset: int) -> Any:
        nested = isinstance(ptype, pyfive.p5t.P5SequenceType) and isinstance(
            ptype.base_dtype, pyfive.p5t.P5SequenceType
        )
        if nested or count > len(buf):
            raise ValueError(f"an attribute of {count} values in {len(buf)} bytes")
        return super()._attr_value(ptype, buf, count, offset)


class _File(pyfive.File):  # type: ignore[misc,unused-ignore]
    """A file whose objects are of the kind above."""

    def _get_dataobjects(self, address: int) -> _Objects:
        objects: dict[int, _Objects] = self._dataobjects_cache
        if address not in objects:
            objects[address] = _Objects(self._fh, address, global_heaps=self._global_heaps)
        return objects[address]


def from_bytes(content: bytes, only: Collection[str] | None = None) -> xr.Dataset:
    """The record, in memory. ValueError with what is wrong, whatever the bytes are.

    `only`: unpack these variables alone, of those that the record has, with label and step; the
    others stay packed and unchecked.
    """
    try:
        return validated(_read(content, only), whole=only is None)
    except ValueError as error:
        raise ValueError(f"not a class record: {error}") from None
    except Exception as error:  # of many kinds: AssertionError, struct.error, MemoryError, ...
        kind = type(error).__name__
        raise ValueError(f"not a class record: its HDF5 is broken ({kind}: {error})") from None


def _read(content: bytes, only: Collection[str] | None) -> xr.Dataset:
    with warnings.catch_warnings(), _File(_Bounded(content)) as file:
        warnings.simplefilter("error")
        names = sorted(set(file) - {"class"})  # netCDF's placeholder for a dimension without values
        missing = {*_VARIABLES, "step"} - set(names)
        if missing or len(names) > _MOST_VARIABLES:
            raise ValueError(f"{len(names)} variables, without {sorted(missing)}")
        variables = {name: _expected(file[name], name) for name in names}
        sizes = {"class": variables["label"].shape[0], "step": variables["step"].shape[0]}
        for name, variable in variables.items():
            dims = _specification(name)[0]
            if variable.shape != tuple(sizes[dim] for dim in dims):
                raise ValueError(f"{name} has the shape {variable.shape}; expected dims {dims}")
        declared = sum(8 * math.prod(variable.shape) for variable in variables.values())
        if declared > _DEFLATE_RATIO * len(content):
            raise ValueError(f"it declares {declared} bytes, which {len(content)} cannot hold")
        (version,) = np.ravel(file.attrs["format_version"])
        dataset = xr.Dataset(attrs={"format_version": int(version)})
        dataset["label"] = _strings(_labels(variables.pop("label"), content))
        dataset.coords["step"] = ("step", _numbers(variables.pop("step"), content))
        for name in [name for name in variables if only is None or name in only]:
            variable = variables[name]
            attributes = {"units": "nat"} if name.endswith("loss") else {}
            dataset[name] = (_specification(name)[0], _numbers(variable, content), attributes)
        return dataset


def _expected(variable: Any, name: str) -> pyfive.Dataset:
    """The variable, if its type and its storage are those that `record_bytes` makes."""
    if not isinstance(variable, pyfive.Dataset) or not isinstance(variable.shape, tuple):
        raise ValueError(f"{name} is not a variable of this file")
    dims, dtype, _ = _specification(name)
    stored, kind = variable.id, variable.id.get_type()
    is_string = isinstance(kind, pyfive.p5t.P5VlenStringType)
    if len(variable.shape) != len(dims) or (
        not is_string if dtype == "object" else is_string or variable.dtype != np.dtype(dtype)
    ):
        raise ValueError(f"{name} is {variable.dtype} over {variable.shape}; expected {dtype}")
    if math.prod(variable.shape) and stored.layout_class != (1 if is_string else 2):
        raise ValueError(f"{name} has a layout that is not ours")
    filters = [entry["filter_id"] for entry in stored.filter_pipeline or ()]
    if filters != ([] if is_string else [_SHUFFLE, _DEFLATE]) and math.prod(variable.shape):
        raise ValueError(f"{name} has the filters {filters}")
    return variable


def _labels(variable: pyfive.Dataset, content: bytes) -> list[str]:
    """The strings, each a reference into one of the file's global heaps.

    Read here: pyfive takes half a run's time for it.
    """
    count = variable.shape[0]
    references = np.frombuffer(content, _REFERENCE, count, variable.id.data_offset if count else 0)
    addresses, heap = np.unique(references["address"], return_inverse=True)
    sizes = [_heap_size(content, address) for address in addresses.tolist()]
    if sum(sizes) > len(content):
        raise ValueError("heaps that lie in each other")
    heaps = [content[a : a + size] for a, size in zip(addresses.tolist(), sizes, strict=True)]
    return list(_texts(tuple(heaps), heap.tobytes(), references["index"].tobytes()))


def _heap_size(content: bytes, address: int) -> int:
    """Bytes of the global heap at `address` (HDF5 file format, III.E); 0 is no heap."""
    if not address:
        return 0
    signature, size = _HEAP.unpack_from(content, address)
    if signature != b"GCOL" or size < _HEAP.size or address + size > len(content):
        raise ValueError("a heap that is none")
    return int(size)


@functools.lru_cache(maxsize=1)  # runs that are compared have the same labels
def _texts(heaps: tuple[bytes, ...], heap: bytes, index: bytes) -> tuple[str, ...]:
    """The label of every class: in which of `heaps` (intp), and which object there (uint32)."""
    objects = [_heap_objects(content) for content in heaps]
    which, place = np.frombuffer(heap, np.intp).tolist(), np.frombuffer(index, "<u4").tolist()
    stored = [objects[i][j] for i, j in zip(which, place, strict=True)]
    # One string of the file is one object, however often it is pointed to.
    if sum(map(len, stored)) > sum(map(len, heaps)):
        raise ValueError("labels that share their text")
    return tuple(_unescaped([label.decode("ascii") for label in stored]))


def _heap_objects(heap: bytes) -> dict[int, bytes]:
    """The objects of a global heap by index; 0 is no object."""
    objects, place = {0: b""}, _HEAP.size
    while place + _HEAP_OBJECT.size <= len(heap):
        index, length = _HEAP_OBJECT.unpack_from(heap, place)
        place += _HEAP_OBJECT.size
        if index == 0:
            break
        objects[index] = heap[place : place + length]
        place += -(-length // 8) * 8
    return objects


def _numbers(variable: pyfive.Dataset, content: bytes) -> NDArray[Any]:
    """The values of a chunked variable; chunk by chunk, so that none grows beyond its size."""
    shape, chunks, stored = variable.shape, variable.chunks, variable.id
    values = np.empty(shape, dtype=variable.dtype)
    if not values.size:
        return values
    if len(chunks) != len(shape) or not all(0 < c <= n for c, n in zip(chunks, shape, strict=True)):
        raise ValueError(f"chunks {chunks} of the shape {shape}")
    if stored.get_num_chunks() != math.prod(-(-n // c) for c, n in zip(chunks, shape, strict=True)):
        raise ValueError(f"{stored.get_num_chunks()} chunks {chunks} of the shape {shape}")
    for start in itertools.product(*(range(0, n, c) for c, n in zip(chunks, shape, strict=True))):
        chunk = stored.get_chunk_info_by_coord(start)
        if chunk.filter_mask:
            raise ValueError("a chunk without its filters")
        packed = memoryview(content)[chunk.byte_offset : chunk.byte_offset + chunk.size]
        block = _unpacked(packed, math.prod(chunks)).view(variable.dtype).reshape(chunks)
        target = values[tuple(slice(s, s + c) for s, c in zip(start, chunks, strict=True))]
        target[...] = block[tuple(slice(n) for n in target.shape)]
    return values


def _unpacked(packed: memoryview, count: int) -> NDArray[np.uint8]:
    """Undo HDF5's filters deflate and shuffle of `count` eight-byte numbers."""
    inflater = zlib.decompressobj()
    shuffled = inflater.decompress(packed, 8 * count)
    if len(shuffled) != 8 * count or not (inflater.eof or not inflater.decompress(b"", 1)):
        raise ValueError("a chunk of another size than it declares")
    return np.ascontiguousarray(np.frombuffer(shuffled, np.uint8).reshape(8, count).T)


def _unescaped(stored: list[str]) -> list[str]:
    """Every label. All at once where that gives the same text back, else one by one."""
    try:
        labels = "\0".join(stored).encode("ascii").decode("unicode_escape").split("\0")
        again = "\0".join(labels).encode("unicode_escape").decode("ascii")
    except (ValueError, DeprecationWarning):
        again = ""
    if again != r"\x00".join(stored) or len(labels) != len(stored):
        return [_unescape(label) for label in stored]
    return labels


def _unescape(stored: str) -> str:
    label = stored.encode("ascii").decode("unicode_escape")
    if label.encode("unicode_escape").decode("ascii") != stored:
        raise ValueError(f"label {stored!r} is not in unicode_escape")
    return label


def _specification(name: str) -> tuple[tuple[str, ...], str, str | None]:
    if name == "step":
        return ("step",), "int64", None
    if name in _VARIABLES:
        return _VARIABLES[name]
    prefix = name.rpartition("_")[0]
    if not prefix:
        raise ValueError(f"{name!r} is no variable of a class record; expected <prefix>_<measure>")
    return (_WINDOW, "int64", None) if name.endswith("_count") else (
        _WINDOW, "float64", f"{prefix}_count",
    )  # fmt: skip


def _integers(name: str, values: ArrayLike) -> np.ndarray[Any, np.dtype[np.int64]]:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {array.dtype}; expected integers")
    return array.astype(np.int64)


def _strings(labels: Sequence[str]) -> xr.Variable:
    # The fast path: else pandas makes UTF-8 of the strings, which a lone surrogate does not have.
    return xr.Variable("class", np.array([*labels, None], dtype=object)[:-1], fastpath=True)
