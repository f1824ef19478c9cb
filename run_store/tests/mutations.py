"""Changes to files, from flipped bits to new values in their structure. Small on purpose."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

_SMALL = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 32, 64, 127, 128, 255)
# What has broken readers of JSON and text before.
_HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**19, 10**30, 1e308, -0.0, 1e-320, "", "x", "\ud800",
    "\x1b[2J", "[/b]", "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "nan", "1e999", "\0",
    "a" * 5000, [], {}, [[]], {"": None}, [1, 2], "__import__('os').system('true')", "１２",
)  # fmt: skip
_RAW = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"',
    b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r", b"\n", b"\0", b'"', b",", b"{", b"}", b"0x1",
)  # fmt: skip


def mutate_bytes(content: bytes, random: Random, kinds: int = 8) -> bytes:
    """A few local changes: bits, small and large integers, blocks moved, cut or doubled."""
    data = bytearray(content or b"\0")
    for _ in range(random.choice((1, 1, 1, 2, 3, 5, 9))):
        # Headers come first: half of the changes are made there.
        span = len(data) if random.random() < 0.5 else min(len(data), 4096)
        at = random.randrange(max(1, span))
        kind = random.randrange(kinds)
        if kind == 0:
            data[at : at + 1] = bytes((data[at] ^ 1 << random.randrange(8),)) if data else b"\0"
        elif kind == 1:
            data[at : at + 1] = bytes((random.choice(_SMALL),))
        elif kind == 2:
            data[at : at + 1] = bytes((random.randrange(256),))
        elif kind == 3:
            width = random.choice((2, 4, 8))
            top = 1 << 8 * width
            values = (0, 1, top // 2 - 1, top // 2, top - 1, 2**31, 2**20, len(data), at)
            data[at : at + width] = (random.choice(values) % top).to_bytes(width, "little")
        elif kind == 4:
            source, size = (
                random.randrange(max(1, len(data))),
                random.choice((1, 4, 8, 16, 64, 256)),
            )
            data[at : at + size] = data[source : source + size]
        elif kind == 5:
            del data[at : at + random.choice((1, 2, 8, 64, len(data)))]
        elif kind == 6:
            data[at:at] = random.choice(_RAW)
        else:
            data[at:at] = data[at : at + random.choice((1, 8, 64))]
        data = data or bytearray(b"\0")
    return bytes(data)


def mutate_in_place(content: bytes, random: Random) -> bytes:
    """Mostly changes that move nothing, for files whose parts are found by their offsets."""
    return mutate_bytes(content, random, 5 if random.random() < 0.8 else 8)


def mutate_json(content: bytes, random: Random) -> bytes:
    """JSON with another value, key or shape somewhere; some of the time, other bytes."""
    if random.random() < 0.25:
        return mutate_bytes(content, random)
    try:
        value = json.loads(content)
        for _ in range(random.choice((1, 1, 2, 4))):
            value = _changed(value, random)
        return json.dumps(value).encode()
    except (ValueError, OverflowError, RecursionError):
        return mutate_bytes(content, random)


def mutate_lines(content: bytes, random: Random) -> bytes:
    """Lines of JSON or text, one of them changed, doubled, dropped or moved."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, random.choice(lines))
    elif kind == 2:
        random.shuffle(lines)
    else:
        lines[at] = mutate_json(lines[at], random)
    return b"\n".join(lines)


def with_header(
    mutate: Callable[[bytes, Random], bytes],
) -> Callable[[bytes, Random], bytes]:
    """For a file that begins with the length (eight bytes) of its JSON header: safetensors."""

    def changed(content: bytes, random: Random) -> bytes:
        if len(content) < 8 or random.random() < 0.4:
            return mutate_bytes(content, random)
        (size,) = struct.unpack("<Q", content[:8])
        header = mutate(content[8 : 8 + size], random)
        return struct.pack("<Q", len(header)) + header + content[8 + size :]

    return changed


def mutate_zip(content: bytes, random: Random) -> bytes:
    """A zip archive with one record changed and every checksum right; else its bytes changed."""
    if random.random() < 0.3:
        return mutate_bytes(content, random)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return mutate_bytes(content, random)
    if not records:
        return mutate_bytes(content, random)
    # The pickle comes first and is where the structure is.
    at = 0 if random.random() < 0.7 else random.randrange(len(records))
    records[at] = records[at][0], mutate_bytes(records[at][1], random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, record in records:
            archive.writestr(name, record)
    return buffer.getvalue()


def _changed(value: Any, random: Random) -> Any:
    """The value with one place in it changed."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.randrange(10)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {str(random.choice(_HOSTILE))[:40]: value[key]}
        if kind == 2:
            return value | {key: value[random.choice(list(value))]}
        return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        if random.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], _changed(value[at], random), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.5:
        return random.choice((value + 1, -value, value * 10, value * 2**20, value / 3))
    return random.choice(_HOSTILE)
