"""Files that anyone may have written: read whole, bounded, and without following a trap.

A pipe would never end, a device neither, a symbolic link inside a store would lead out of it, and
JSON knows numbers and depths that the code behind it does not.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MOST_DEPTH = 64
_MOST_DIGITS = 40  # more than what transformers writes for "any length"


def read_file(path: Path, *, most_bytes: int, follow_links: bool = True) -> bytes:
    """The bytes of a regular file.

    Raises ValueError, naming the file, if it is a folder, pipe or device, larger than `most_bytes`
    or, unless `follow_links`, a symbolic link; OSError where it is missing or cannot be read.
    """
    flags = os.O_RDONLY if follow_links else os.O_RDONLY | os.O_NOFOLLOW
    with open(path, "rb", opener=lambda name, _: open_regular(name, flags)) as file:
        size = os.fstat(file.fileno()).st_size
        # Not of the most bytes, for which Python would reserve memory.
        content = file.read(size + 1) if size <= most_bytes else b""
    if max(size, len(content)) > most_bytes:
        raise ValueError(f"{path} has {size} bytes; expected at most {most_bytes}")
    return content


def open_regular(path: str | Path, flags: int) -> int:
    """The descriptor of a regular file, as an opener of `open` returns it; else ValueError."""
    try:
        # Not blocking: else opening a pipe waits for its other end.
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link; expected a file of its own") from None
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise ValueError(f"{path} is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor


def parse_json(content: bytes, where: str, *, infinity: bool = False) -> dict[str, Any]:
    """A JSON object. ValueError, beginning with `where`, for anything else.

    Stricter than `json`: no NaN, no infinity, however it is spelled (but the word Infinity where
    `infinity` allows it), no integer of more than 40 digits, nothing nested deeper than 64 levels.
    """
    try:
        decoder = _WITH_INFINITY if infinity else _DECODER
        value = decoder.decode(content.decode("utf-8"))
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object")
    return value


def is_integer(value: object) -> bool:
    """One of JSON's integers; Python takes True for one, too."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """One of JSON's numbers, which `parse_json` has seen to be finite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _int(text: str) -> int:
    if len(text) > _MOST_DIGITS + 1:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _infinite(text: str) -> float:
    return float(text) if text.endswith("Infinity") else _no_constant(text)


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=_no_constant)
_WITH_INFINITY = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=_infinite)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MOST_DEPTH} levels")
