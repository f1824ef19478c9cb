"""What is stricter than `open` and `json`; the traps on disk are in test_hostile_store.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_store.input_files import parse_json, read_file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "-Infinity"),
        (b'{"a": 1e999}', "1e999 is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "deeper than 64"),
        (b'{"a": ' * 10**5, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"", "not JSON"),
    ],
)
def test_what_is_no_json_here(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        parse_json(content, "the file")


def test_what_transformers_writes_is_json() -> None:
    assert parse_json(b'{"a": 1000000000000000019884624838656}', "")["a"] == int(1e30)
    assert parse_json(b'{"a": {"b": [1e308, -0.5, true, null]}}', "") == {
        "a": {"b": [1e308, -0.5, True, None]}
    }


def test_a_file_is_read_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, most_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="file has 5 bytes; expected at most 4"):
        read_file(path, most_bytes=4)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_file(tmp_path / "nothing", most_bytes=4)
