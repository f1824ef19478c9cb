from __future__ import annotations

import csv
import json

import pytest

from ufm import UFMProblem, closed_form
from ufm.__main__ import main
from ufm.counts_file import count_words, read_counts
from ufm.files import write_csv
from ufm.verification import Claim


def test_solve_prints_the_certificate(capsys):
    command = "solve --class-counts 500 60 7 1 --lambda-W 2e-3 --lambda-H 5e-3"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    exact = closed_form(UFMProblem(class_counts=[500, 60, 7, 1], lambda_W=2e-3, lambda_H=5e-3))
    assert f"{float(exact.loss[1]):.10g}" in out
    assert "certified: a global minimum" in out


def test_solve_beyond_the_theorem(capsys):
    command = "solve --class-counts 60 7 5 --lambda-W 2e-3 --lambda-H 5e-3 --width 1"
    assert main(command.split()) == 0
    assert "stationary" in capsys.readouterr().out


def test_solve_with_a_decay_of_its_own_for_each_row(capsys):
    command = "solve --class-counts 6 3 2 1 --lambda-W 0.01 0.02 0.04 0.08 --lambda-H 0.01"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    # The least of eight starts of scipy's L-BFGS-B.
    assert "objective   0.3758840481" in out
    assert "none known" in out


def test_predict_writes_every_class(tmp_path, capsys):
    counts = tmp_path / "counts.csv"
    counts.write_text('label,count\n"a,b",500\nx,0\n☃,60\nd,1\n', encoding="utf-8")
    output = tmp_path / "out.csv"
    command = ["predict", "--counts", str(counts), "--lambda-W", "2e-3", "--output", str(output)]
    assert main(command) == 0
    rows = list(csv.DictReader(output.read_text(encoding="utf-8").splitlines()))
    exact = closed_form(UFMProblem(class_counts=[500, 60, 1], lambda_W=2e-3, lambda_H=2e-3))
    assert [row["label"] for row in rows] == ["a,b", "☃", "d"]
    # Each within 3e-14 of the truth, as test_closed_form.py has it.
    losses = [float(row["loss"]) for row in rows]
    assert losses == pytest.approx(exact.loss.tolist(), rel=1e-13, abs=0)
    assert [row["learned"] for row in rows] == [str(int(x)) for x in ~exact.collapsed]
    assert "1 of them never occur" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [counts, output]


def test_predict_from_a_text_at_a_given_critical_count(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the bird", encoding="utf-8")
    assert main(["predict", "--corpus", str(text), "--critical-count", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "critical count 1.5" in out
    assert "neglected      3 classes, 37.5 %" in out


def test_phase_draws_the_boundary(tmp_path, capsys):
    command = ["phase", "--points", "8", "--class-counts", "1", "10", "100", "--output"]
    assert main([*command, str(tmp_path / "map")]) == 0
    assert "0 of 24 cells off the theory" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "map.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 24
    assert {row["collapsed"] for row in rows} == {"0", "1"}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_verify_settles_every_claim(tmp_path, capsys):
    counts = tmp_path / "counts.txt"
    counts.write_text("\n".join(str(10_000 // rank) for rank in range(1, 1001)), encoding="utf-8")
    output = tmp_path / "claims.csv"
    assert main(["verify", "--counts", str(counts), "--output", str(output)]) == 0
    assert "16 of 16 claims settled" in capsys.readouterr().out
    rows = list(csv.DictReader(output.read_text(encoding="utf-8").splitlines()))
    by_name = {row["claim"]: row for row in rows}
    for name in (
        "Proposition 5.1", "M_k", "(d) weight norms", "d loss / d lambda",
        "own logit in the proof", "other logits in the proof",
    ):  # fmt: skip
        assert float(by_name[name]["error corrected"]) < 1e-9
        assert float(by_name[name]["error printed"]) > 1e-2
    assert by_name["(a) within-class collapse"]["verdict"] == "holds"


def test_a_claim_that_fails_is_not_confirmed():
    fields = {"name": "", "where": "", "printed": "", "corrected": ""}
    for printed, corrected, misprinted, confirmed in (
        (0.5, 1e-9, True, True),
        (1e-9, 1e-9, True, False),
        (0.5, 1e-3, True, False),
        (1e-9, 1e-9, False, True),
        (0.5, 1e-9, False, False),
    ):
        claim = Claim(
            printed_error=printed, corrected_error=corrected, misprinted=misprinted, **fields
        )
        assert claim.confirmed is confirmed
        assert (claim.verdict == "NOT CONFIRMED") is not confirmed


@pytest.mark.parametrize(
    ("name", "text", "labels", "counts"),
    [
        ("a.txt", "5\n3\n\n0\n", ["0", "1", "2"], [5, 3, 0]),
        ("a.csv", "token,count\nx,5\ny,3\n", ["x", "y"], [5, 3]),
        ("a.csv", "x,5\ny,3\n", ["x", "y"], [5, 3]),
        ("a.json", "[5, 3.0]", ["0", "1"], [5, 3]),
        ("a.json", '{"x": 5, "y": 3}', ["x", "y"], [5, 3]),
        ("a.json", '{"class_counts": [5, 3], "note": "z"}', ["0", "1"], [5, 3]),
    ],
)
def test_counts_files(tmp_path, name, text, labels, counts):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_counts(path) == (labels, counts)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", "5\n-3\n", "-3"),
        ("a.txt", "5\n2.5\n", r"2\.5"),
        ("a.csv", "token,count\nx,1.000\n", r"'1\.000': is that 1 or 1000\?"),
        ("a.csv", 'token,count\nx,"12,345"\n', "is that 12 or 12345"),
        ("a.txt", "5\n3.210.000\n", "is that 3 or 3210000"),
        ("a.txt", "5\nmany\n", "many"),
        ("a.txt", "0\n0\n", "no count above 0"),
        ("a.csv", "label,count\nx\n", "expected 2 columns"),
        ("a.json", "[5, ", "not JSON"),
        ("a.json", "3", "int"),
        ("a.json", "[5, true]", "True"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", json.dumps([5, 1e300]), "1e"),
    ],
)
def test_bad_counts_files_are_named(tmp_path, name, text, named):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        read_counts(path)


def test_bad_texts_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        count_words(path)
    path.write_text("one one", encoding="utf-8")
    with pytest.raises(ValueError, match="1 different"):
        count_words(path)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("", "verify"),
        (
            "prove",
            "'prove' is unknown; expected one of verify, solve, predict, phase, train",
        ),
        ("solve --class-counts 5 2 --lambda-W 1 2 3 --lambda-H 1", "lambda_W has shape (3,)"),
        ("solve --class-counts 5 0 --lambda-W 1 --lambda-H 1", "holds 0"),
        ("solve --class-counts 5 --lambda-W 1 --lambda-H 1", "two classes"),
        ("solve --class-counts 5 x --lambda-W 1 --lambda-H 1", "x"),
        ("solve --class-counts 5 2.5 --lambda-W 1 --lambda-H 1", "2.5"),
        ("solve --class-counts 5 2 --lambda-W 0 --lambda-H 1", "lambda_W is 0.0"),
        ("solve --class-counts 5 2 --lambda-W nan --lambda-H 1", "lambda_W is nan"),
        ("solve --class-counts 5 2 --lambda-W 1 --lambda-H 1 --width 0", "width is 0"),
        ("solve --class-counts 5 2 --lambda-W 1 --lambda-H 1 --device moon", "moon"),
        ("solve --class-counts 5 2 --lambda-W 1 --lambda-H 1 --width 999999999", "too large"),
        ("predict --lambda-W 1e-3", "neither"),
        ("predict --counts nowhere.csv --lambda-W 1e-3", "'nowhere.csv': No such file"),
        ("predict --counts nowhere.csv --lambda-W 1e-3 --output no/such/x.csv", "no/such"),
        ("phase --smallest 1 --largest 0.1", "expected 0 < smallest"),
        ("solve --class-counts 5 2 --lambda-W 1 --lambda-H 1 --device meta", "meta"),
        ("solve --class-counts 5 2 --lambda-W 1 --lambda-H 1 --seed 1" + "0" * 30, "seed is 1"),
        ("solve --class-counts 5 2 --lambda-W 1", "error: Missing from"),
        ("phase --points 1", "error: points is 1"),
        ("phase --points 1" + "0" * 12, "points is 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


def test_help_mentions_every_command(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    for name in ("verify", "solve", "predict", "phase", "train"):
        assert name in out


def test_predict_needs_one_source_of_decay(tmp_path, capsys):
    path = tmp_path / "c.txt"
    path.write_text("5\n3\n", encoding="utf-8")
    assert main(["predict", "--counts", str(path)]) == 2
    assert "neither of --lambda-W and --critical-count" in capsys.readouterr().err


def test_labels_of_any_text_are_read_as_they_were_written(tmp_path: Path) -> None:
    labels = [" a", "x,y", 'say "so"', "two\nlines", "next\x85line", "\u2028", "carriage\r", " "]
    path = tmp_path / "counts.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("token", "count"))
        writer.writerows(zip(labels, range(1, 9), strict=True))
    assert read_counts(path) == (labels, list(range(1, 9)))


def test_a_figure_that_cannot_be_written_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    command = [
        "phase",
        "--points",
        "2",
        "--class-counts",
        "1",
        "9",
        "--output",
        str(tmp_path / "p"),
    ]
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_a_write_that_fails_names_the_file(tmp_path):
    def rows():
        yield ("a", 1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_csv(tmp_path / "table.csv", ("label", "count"), rows())
    assert caught.value.filename == str(tmp_path / "table.csv")
    assert not list(tmp_path.iterdir())
