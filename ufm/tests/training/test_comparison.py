from __future__ import annotations

import csv
import math

import pytest
import torch

from ufm.__main__ import main
from ufm.training import TableTraining, train_table
from ufm.training.comparison import compare, verdict

QUICK = "--steps 40 --batch-size 4 --width 6 --class-counts 9 4 2"


def read(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_l2_is_held_against_the_closed_form(tmp_path, capsys):
    command = f"train {QUICK} --weight-decay 0.02 0.01 --output {tmp_path / 'l2'}"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    rows = read(tmp_path / "l2.csv")
    assert [row["weight_decay"] for row in rows] == ["0.01"] * 3 + ["0.02"] * 3
    assert [row["count"] for row in rows[:3]] == ["9", "4", "2"]
    training = TableTraining(steps=40, batch_size=4, width=6, class_counts=(9, 4, 2))
    for decay, part in ((0.01, rows[:3]), (0.02, rows[3:])):
        trained = train_table(training, weight_decay=decay)
        losses = [float(row["loss"]) for row in part]
        assert losses == pytest.approx(trained.loss.tolist(), rel=1e-11)  # of 40 steps in float64
        for row in part:
            exact = -math.log(1 - decay * math.sqrt(2 / 3) * 15 / int(row["count"]))
            assert float(row["predicted_loss"]) == pytest.approx(exact, rel=1e-12)
            assert row["constant_push"] == row["share_lost"] == row["predicted_share"] == ""
    assert "weight decay 0.01 (kappa 0.82): loss off by" in out
    assert (tmp_path / "l2.png").read_bytes().startswith(b"\x89PNG")


def test_decoupled_decay_is_held_against_what_is_derived(tmp_path, capsys):
    command = f"train {QUICK} --optimizer adamw --weight-decay 0 2 --output {tmp_path / 'w'}"
    assert main(command.split()) == 0
    rows = read(tmp_path / "w.csv")
    kappa = 2.0 * float(TableTraining(steps=40, optimizer="adamw").learning_rates.sum())
    for without, decayed in zip(rows[:3], rows[3:], strict=True):
        assert without["share_lost"] == ""
        lost = math.log(float(without["margin"]) / float(decayed["margin"])) / kappa
        assert float(decayed["share_lost"]) == pytest.approx(lost, rel=1e-9)
        predicted = float(without["predicted_margin"]) / float(decayed["predicted_margin"])
        assert float(decayed["predicted_share"]) == pytest.approx(math.log(predicted) / kappa)
        assert 0 < float(decayed["constant_push"]) < float(without["constant_push"])
    assert "1/decay 0.5" in capsys.readouterr().out


def test_counts_of_a_file_keep_their_labels(tmp_path):
    counts = tmp_path / "counts.csv"
    counts.write_text('label,count\n"a,b",9\nx,0\n☃,4\n', encoding="utf-8")
    command = f"train --counts {counts} --steps 3 --weight-decay 0.1 --output {tmp_path / 'c'}"
    assert main(command.split()) == 0
    rows = read(tmp_path / "c.csv")
    assert [(row["label"], row["count"]) for row in rows] == [("a,b", "9"), ("☃", "4")]


@pytest.mark.parametrize(
    ("settings", "decay", "said"),
    [
        ({"features": "free"}, 0.1, "nothing to hold it against"),
        ({}, 0.0, "lambda_W is 0.0"),
        ({"width": 1}, 1e-4, "width"),
        ({"steps": 3}, 0.1, "no class occurs in 30 batches"),
        ({"optimizer": "adamw", "features": "normalized"}, 0.1, "features are normalized"),
    ],
)
def test_where_theory_says_nothing_the_cells_are_empty(settings, decay, said):
    training = TableTraining(**({"class_counts": (5, 2), "steps": 40, "batch_size": 2} | settings))
    found = compare(train_table(training, weight_decay=decay))
    assert said in verdict(found)
    assert bool(found.why_not) == bool(torch.isnan(found.predicted.loss).all())


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("train --steps 0", "steps is 0"),
        ("train --width 0", "width is 0"),
        ("train --optimizer lion", "optimizer is 'lion'; expected one of sgd, adam, adamw"),
        ("train --weight-decay nan", "weight_decay is nan"),
        ("train --weight-decay 0.1 -1", "weight_decay is -1.0"),
        ("train --learning-rate 0", "learning_rate is 0.0"),
        ("train --beta2 1", "beta2 is 1.0"),
        ("train --threads 0", "threads is 0"),
        ("train --class-counts 5", "two classes"),
        ("train --device moon --steps 1", "moon"),
        ("train --counts nowhere.csv", "No such file"),
        ("train --output no/such/x --steps 1", "no/such"),
        ("train --steps 9 --learning-rate 1e300 --class-counts 5 2", "diverged"),
        ("train --width 999999999999 --steps 1", "too large to allocate"),
        ("train --seed 1" + "0" * 30, "seed is 1"),
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
