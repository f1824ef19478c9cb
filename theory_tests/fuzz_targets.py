"""The readers of class counts under fire; see `run_store.tests.fuzzing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from run_store.tests.fuzzing import Reader, Target
from run_store.tests.mutations import mutate_json, mutate_lines
from ufm import UFMProblem
from ufm.counts_file import count_words, read_counts

_MODULES = ("ufm.counts_file", "csv", "json.decoder")


def _reader(name: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        path = folder / name

        def read(content: bytes) -> None:
            path.write_bytes(content)
            labels, counts = read_counts(path)
            assert len(labels) == len(counts)
            assert all(type(count) is int and 0 <= count < 2**53 for count in counts)
            "".join(labels).encode("utf-8", "surrogatepass")

        return read

    return make


def _words(folder: Path) -> Reader:
    path = folder / "words.txt"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        words, counts = count_words(path)
        assert len(words) == len(counts) >= 2
        UFMProblem(class_counts=counts, lambda_W=1e-3, lambda_H=1e-3)

    return read


TARGETS = [
    Target(
        "counts.csv",
        lambda: [
            b'token,count\nthe,500\n"a,\nb",60\n,7\n',
            b"500\n60\n7\n",
            b"the,500\r\nof,60\r\n",
            "\ufefflabel;x,class_count\n1,2\n3,4\n".encode(),
        ],
        _reader("counts.csv"),
        "counts.csv",
        mutate_lines,
        _MODULES,
    ),
    Target(
        "counts.json",
        lambda: [
            b'{"the": 500, "of": 60, "": 7}',
            b"[500, 60, 7.0, 0]",
            b'{"class_counts": [5, 4], "lambda": 1e-3}',
        ],
        _reader("counts.json"),
        "counts.json",
        mutate_json,
        _MODULES,
    ),
    Target(
        "words.txt",
        lambda: ["the of the\nand \u2028 the \x85 é".encode(), b"a b"],
        _words,
        "words.txt",
        modules=_MODULES,
    ),
]
