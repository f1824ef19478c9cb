"""Class counts from files that anyone may have written."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

MAX_BYTES = 2**28  # of counts: a million of them are some 20 MB
MAX_TEXT_BYTES = 2**31
COUNT_NAMES = ("count", "class_count", "counts", "class_counts")
LABEL_NAMES = ("label", "token", "class")


def read_counts(path: Path) -> tuple[list[str], list[int]]:
    """Labels and counts from one integer a line, a CSV, or JSON.

    CSV: a header with a column named count (or class_count), and perhaps label (or token); or no
    header and the count last. JSON: a list of integers, an object of label to count, or an object
    with the list under "class_counts" or "counts". Without labels a class is its position.

    Raises ValueError naming the file and the entry, OSError where it cannot be read.
    """
    text = _text(path, MAX_BYTES)
    read = _json_pairs if path.suffix.lower() == ".json" else _line_pairs
    pairs = read(path, text)
    counts = [_whole(path, label, value) for label, value in pairs]
    if not any(counts):
        raise ValueError(f"{path} holds no count above 0; expected at least two classes")
    return [label for label, _ in pairs], counts


def count_words(path: Path) -> tuple[list[str], list[int]]:
    """The words of a UTF-8 text between white space, most frequent first, and their counts.

    Raises ValueError for fewer than two words, OSError where the file cannot be read.
    """
    words = Counter(_text(path, MAX_TEXT_BYTES).split()).most_common()
    if len(words) < 2:
        raise ValueError(f"{path} holds {len(words)} different words; expected at least two")
    return [word for word, _ in words], [count for _, count in words]


def _text(path: Path, most_bytes: int) -> str:
    # A pipe will do, as from the shell's <(command); its size shows as it is read.
    content = bytearray()
    with path.open("rb") as file:
        while part := file.read(2**20):
            content += part
            if len(content) > most_bytes:
                raise ValueError(f"{path} is larger than {most_bytes} bytes, which is the most")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _json_pairs(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        lists = [data[name] for name in COUNT_NAMES if isinstance(data.get(name), list)]
        if not lists:
            return [(str(label), value) for label, value in data.items()]
        data = lists[0]
    if not isinstance(data, list):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a list or an object")
    return [(str(position), value) for position, value in enumerate(data)]


def _line_pairs(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        # Not text.splitlines(): a label may hold a line break, in quotes, or another separator.
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; expected one count a line")
    header = [name.strip().lower() for name in rows[0]]
    column = next((header.index(name) for name in COUNT_NAMES if name in header), None)
    label = next((header.index(name) for name in LABEL_NAMES if name in header), None)
    if column is not None:
        rows = rows[1:]
    width = max(column or 0, label or 0)
    for position, row in enumerate(rows):
        if len(row) <= width:
            raise ValueError(f"{path}: row {position} is {row!r:.80}; expected {width + 1} columns")
    at = -1 if column is None else column
    if label is None and column is None and len(rows[0]) > 1:
        label = 0
    return [
        (str(position) if label is None else row[label], row[at].strip())
        for position, row in enumerate(rows)
    ]


def _whole(path: Path, label: str, value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,2}([.,]\d{3})+", value.strip()):
        whole, thousands = re.split("[.,]", value)[0], re.sub("[.,]", "", value)
        raise ValueError(
            f"{path}: the count of {label!r:.80} is {value!r}: is that {whole} or {thousands}? "
            "Expected a whole number in digits alone"
        )
    try:
        number = float(value) if isinstance(value, (str, int, float)) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not (number >= 0 and number == number // 1 and number < 2**53):
        shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
        raise ValueError(
            f"{path}: the count of {label!r:.80} is {shown:.80}; expected a whole number >= 0"
        )
    return int(number)
