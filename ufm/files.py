"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, in place of whatever `path` holds. OSError where it cannot be written."""
    with beside(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`: renamed to it at the end, removed if that fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # that of a failed write
            error.filename = str(path)
        raise


def check_folder(path: Path) -> None:
    """Raise ValueError where no file could be written to `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"output is {path}; expected a folder that exists, not {path.parent}")
    if path.is_dir():
        raise ValueError(f"output is {path}, a folder; expected a file")
