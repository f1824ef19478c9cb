"""The run store: what is written comes back, crashes and foreign files do no harm."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from run_store import (
    Run,
    attempt,
    class_record,
    publish,
    read_study,
    run_id,
    stack,
    write_atomically,
)
from run_store.records import validated

CONFIG = {"model": "tiny", "weight_decay": 0.1, "seed": 0, "betas": [0.9, 0.95], "note": "é"}
SURROGATES = ["\x00", "a\x00", "\ud83d\ude00", "😀", "\udcff", "\\n", "\n", '"', "", "Ġthe", "<b>"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
per_example_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=12
)


def record(num_classes: int = 4, seed: int = 0, **changes: Any) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 3, (3, num_classes))
    total = count.sum(axis=0)
    arrays: dict[str, Any] = {
        "steps": [10, 20, 30],
        "class_counts": total,
        "labels": [f"token{i}" for i in range(num_classes)],
        "count": count,
        "loss": np.where(count > 0, rng.random(count.shape), np.nan),
        "accuracy": np.where(count > 0, rng.random(count.shape), np.nan),
        "final_count": total,
        "final_loss": np.where(total > 0, rng.random(num_classes), np.nan),
        "final_accuracy": np.where(total > 0, rng.random(num_classes), np.nan),
    }
    return class_record(**(arrays | changes))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Every file that grows beyond `size` bytes fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- run ids and manifests


def test_run_id_is_the_known_hash() -> None:
    # printf '{"a":1,"b":[0.5,"\\u00e9"]}' | sha256sum
    assert run_id({"b": (0.5, "é"), "a": 1.0}) == run_id({"a": 1, "b": [0.5, "é"]})
    assert run_id({"b": (0.5, "é"), "a": 1.0}) == KNOWN_ID
    assert run_id({"a": -0.0}) == run_id({"a": 0})
    assert run_id({"a": True}) != run_id({"a": 1})


KNOWN_ID = "c1517d185ef3"


@given(config=st.dictionaries(st.text(), JSON, max_size=5))
def test_run_id_survives_json_and_the_order_of_fields(config: dict[str, Any]) -> None:
    backwards = dict(reversed(config.items()))
    assert run_id(json.loads(json.dumps(backwards))) == run_id(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"a": float("nan")}, "nan"),
        ({"a": [{"b": float("inf")}]}, "inf"),
        ({"a": {1: 2}}, "key 1"),
        ({"a": Path()}, "PosixPath"),
        ({"a": np.float32(1)}, "float32"),
    ],
)
def test_a_config_that_json_cannot_hold_is_named(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Run.create(tmp_path / "study", config)
    assert not (tmp_path / "study").exists()


def test_create_makes_a_manifest_and_keeps_an_existing_one(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a" / "study", CONFIG, device="cpu")
    assert run.folder == tmp_path / "a" / "study" / run_id(CONFIG)
    assert run.status == "new"
    assert run.config == CONFIG
    assert run.manifest["study"] == "study"
    assert run.manifest["device"] == "cpu"
    with attempt(run) as first:
        first.update(started="now")
    assert run.status == "waiting"
    assert run.manifest["started"] == "now"
    again = Run.create(tmp_path / "a" / "study", dict(reversed(CONFIG.items())), device="cuda")
    assert again.folder == run.folder
    assert again.manifest == run.manifest
    assert again.manifest["device"] == "cpu"
    assert [p.name for p in run.folder.parent.iterdir()] == [run.id]


def test_create_fills_a_folder_that_lost_its_manifest(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    (run.folder / "manifest.json").unlink()
    (run.folder / "checkpoint").write_bytes(b"x")
    assert Run.create(tmp_path, CONFIG).status == "new"


def test_update_keeps_the_identity_of_a_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    with attempt(run) as first:
        for fields in ({"config": {}}, {"run_id": "x"}, {"format_version": 2}):
            with pytest.raises(ValueError, match=next(iter(fields))):
                first.update(**fields)
        with pytest.raises(ValueError, match="JSON"):
            first.update(device=Path())
    assert run.config == CONFIG


def test_an_unwritable_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Run.create(tmp_path / "file" / "study", CONFIG)
    with file_size_limit(10), pytest.raises(OSError, match=r"manifest\.json"):
        Run.create(tmp_path / "study", CONFIG)
    assert list((tmp_path / "study").iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/../../b", "ABCDEF012345", "abcdef01234", "x" * 12])
def test_only_hex_names_are_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="12 hex digits"):
        Run(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format_version": 1, "run_id"',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"format_version": 2}',
        b'{"format_version": 1, "config": {}, "status": ["new"]}',
        b'{"format_version": 1, "config": {}, "status": "new", "run_id": "../../etc/pas"}',
        b'{"format_version": 1, "config": {"a": NaN}, "status": "new", "run_id": "0"}',
    ],
)
def test_a_foreign_manifest_is_named_and_stops_nothing(content: bytes, tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    good = Run.create(tmp_path, CONFIG | {"seed": 1})
    (run.folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        _ = run.manifest
    study = read_study(tmp_path)
    assert [r.id for r in study.unfinished] == [good.id]
    assert [path for path, _ in study.problems] == [run.folder]


@given(content=st.binary(max_size=300))
@per_example_folder
def test_any_bytes_as_manifest_or_scalars(content: bytes, tmp_path: Path) -> None:
    run = Run(tmp_path / "0123456789ab")
    run.folder.mkdir(exist_ok=True)
    (run.folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        _ = run.manifest
    (run.folder / "scalars.jsonl").write_bytes(content)
    if b"\n" in content:
        with pytest.raises(ValueError, match=r"scalars\.jsonl, line"):
            run.scalars()
    else:
        assert run.scalars() == []


def test_a_manifest_moved_to_another_run_is_named(tmp_path: Path) -> None:
    run, other = Run.create(tmp_path, CONFIG), Run.create(tmp_path, {"seed": 5})
    (other.folder / "manifest.json").write_bytes((run.folder / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=f"belongs to the run {run.id}, not to {other.id}"):
        _ = other.manifest


# ---- scalars


def test_scalars_come_back_and_lose_only_what_was_torn(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    assert run.scalars() == []
    rows = [{"step": s, "loss": 1 / (s + 1), "note": "é\n"} for s in range(4)]
    with attempt(run) as first:
        for row in rows:
            first.append_scalars(row)
        first.append_scalars({"step": 4, "loss": float("nan"), "inner": {"x": float("inf")}})
    assert run.scalars() == [*rows, {"step": 4, "loss": None, "inner": {"x": None}}]
    with attempt(run) as second:
        second.resume(1, first.folder)
        assert run.scalars() == rows[:2]
        with open(second.folder / "scalars.jsonl", "ab") as file:
            file.write(b'{"step": 2, "lo')
        assert run.scalars() == rows[:2]
        second.append_scalars(rows[2])
        assert run.scalars() == rows[:3]
        for wrong in ({"loss": 1.0}, {"step": 1.5}):
            with pytest.raises(ValueError, match="step is"):
                second.append_scalars(wrong)


def test_scalars_on_a_full_disk_stay_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    with attempt(run) as first:
        first.append_scalars({"step": 1})
        with file_size_limit(20), pytest.raises(OSError, match=r"scalars\.jsonl"):
            first.append_scalars({"step": 2, "text": "x" * 100})
        assert (first.folder / "scalars.jsonl").read_bytes() == b'{"step": 1}\n'
        first.append_scalars({"step": 3})
        assert run.scalars() == [{"step": 1}, {"step": 3}]


# ---- records


@given(labels=st.lists(st.text(st.characters(exclude_categories=())), min_size=1, max_size=6))
@per_example_folder
def test_a_record_comes_back_with_any_labels(labels: list[str], tmp_path: Path) -> None:
    labels = [*labels, *SURROGATES]
    dataset = record(len(labels), labels=labels)
    run = Run.create(tempfile.mkdtemp(dir=tmp_path), CONFIG)
    publish(run, dataset)
    back = run.classes()
    assert list(back["label"].values) == labels
    assert list(back.isel({"class": slice(1, None)})["label"].values) == labels[1:]
    for name in dataset.variables:
        assert back[name].dtype == dataset[name].dtype
        assert back[name].dims == dataset[name].dims
        if name != "label":
            np.testing.assert_array_equal(back[name].values, dataset[name].values)
    assert back["loss"].attrs["units"] == "nat"


def test_publish_sets_the_status_and_opens_in_other_tools(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="new, not finished"):
        run.classes()
    publish(run, record(), seconds=1.5)
    assert run.status == "finished"
    assert run.manifest["seconds"] == 1.5
    with xr.open_dataset(run.folder / "classes.nc", engine="h5netcdf") as plain:
        assert plain["count"].dtype == np.int64
        assert list(plain["label"].values) == [f"token{i}" for i in range(4)]
        assert plain.attrs["format_version"] == 1


def test_equal_arrays_give_equal_bytes_in_another_process_at_another_time(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from run_store import Run, publish\n"
        "from run_store.tests.test_runs import CONFIG, record\n"
        "publish(Run.create(sys.argv[1], CONFIG), record())"
    )
    here, there = Run.create(tmp_path / "here", CONFIG), tmp_path / "there"
    publish(here, record())
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(there), str(root)], check=True)
    assert files(there)[f"{here.id}/classes.nc"] == files(here.folder)["classes.nc"]
    with h5py.File(here.folder / "classes.nc") as file:
        # HDF5 could store when an object was made: it must not.
        assert not any(file[n].id.get_create_plist().get_obj_track_times() for n in file)


def test_further_windows_join_the_record(tmp_path: Path) -> None:
    count = np.array([[5, 0, 1, 1]] * 3)
    loss = np.where(count > 0, 0.5, np.nan)
    dataset = record(test_count=count, test_loss=loss, test_accuracy=loss)
    run = Run.create(tmp_path, CONFIG)
    publish(run, dataset)
    assert run.classes()["test_loss"].dims == ("step", "class")
    assert run.classes()["test_count"].dtype == np.int64
    with pytest.raises(ValueError, match="test_loss is a mean over test_count, which is missing"):
        record(test_loss=loss)
    with pytest.raises(ValueError, match="speed"):
        record(speed=loss)


def test_an_empty_record_comes_back(tmp_path: Path) -> None:
    empty = np.zeros((0, 4))
    counts = empty.astype(np.int64)
    run = Run.create(tmp_path, CONFIG)
    publish(run, record(steps=[], count=counts, loss=empty, accuracy=empty))
    assert run.classes().sizes == {"class": 4, "step": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [1, 2]}, r"count has the shape \(3, 4\); expected \(2, 4\)"),
        ({"steps": [1, 3, 2]}, "increasing"),
        ({"count": np.full((3, 4), -1)}, "count holds -1"),
        ({"count": np.ones((3, 4))}, "count is float64"),
        ({"count": np.zeros((3, 4), dtype=int)}, "loss has a value where count is 0"),
        ({"accuracy": np.full((3, 4), 2.0)}, "accuracy"),
        ({"labels": ["a"]}, "shape"),
        ({"final_loss": np.ones(3)}, "final_loss"),
    ],
)
def test_a_wrong_record_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**changes)


def test_only_records_are_published(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    halved = record()["loss"].astype("float32")
    numbered = np.array([7, "a", "b", "c"], dtype=object)
    for wrong, message in [
        (xr.Dataset(), "format_version is None"),
        (record().drop_vars("loss"), r"no \['loss'\]"),
        (record().assign(loss=halved), "loss is float32"),
        (record().assign(label=("class", numbered)), "label 7"),
        (record().transpose(), "dims|over"),
    ]:
        with pytest.raises(ValueError, match=message):
            publish(run, wrong)
    assert run.status == "failed"
    assert [path.name for path in run.folder.glob("*.nc")] == []


def test_a_full_disk_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    with file_size_limit(5000), pytest.raises(OSError, match=r"classes\.nc"):
        publish(run, record())
    assert run.status == "failed"
    assert "classes.nc" in run.manifest["error"]
    left = {f"{run.id}/manifest.json", f"{run.id}/attempts/0001/lease.json"}
    assert set(files(tmp_path)) == left


def test_write_atomically_cleans_up_after_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    for name, error in [
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("replace", PermissionError(errno.EACCES, "Permission denied")),
        ("fsync", KeyboardInterrupt()),
    ]:

        def fail(*args: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(type(error)) as caught:
                write_atomically(target, b"new")
        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(target)
        assert files(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "missing"])
def test_a_damaged_record_is_named_and_reported(damage: str, tmp_path: Path) -> None:
    run, good = Run.create(tmp_path, CONFIG), Run.create(tmp_path, CONFIG | {"seed": 1})
    publish(run, record())
    publish(good, record())
    path = run.folder / "classes.nc"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"cut": whole[:-100], "empty": b"", "flipped": flipped, "foreign": b"PK\x03\x04"}
    path.unlink() if damage == "missing" else path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"classes\.nc"):
        run.classes()
    study = read_study(tmp_path)
    assert [r.id for r in study.runs] == [good.id]
    assert [p for p, _ in study.problems] == [run.folder]
    assert study.dataset().sizes["run"] == 1


def _publish_bytes(run: Run, content: bytes) -> None:
    import hashlib

    (run.folder / "classes.nc").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = run.stored_manifest | {"status": "finished", "classes_sha256": digest}
    (run.folder / "manifest.json").write_text(json.dumps(manifest))


def test_hdf5_that_is_no_record_of_ours_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path, CONFIG)
    outside = tmp_path / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["label"] = [1]
    for kind in ("plain", "external link", "external values", "group", "not hdf5"):
        buffer = io.BytesIO()
        if kind != "not hdf5":
            with h5py.File(buffer, "w") as file:
                if kind == "plain":
                    file["label"] = [1, 2]
                elif kind == "external link":
                    file["label"] = h5py.ExternalLink(str(outside), "label")
                elif kind == "external values":
                    values = [(str(outside), 0, 8)]
                    file.create_dataset("label", (1,), "i8", external=values)
                else:
                    file.create_group("label")
        _publish_bytes(run, buffer.getvalue())
        with pytest.raises(ValueError, match=r"classes\.nc: not a class record: "):
            run.classes()


def test_readers_meet_whole_files_while_a_writer_writes(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, CONFIG | {"seed": seed}) for seed in range(15)]
    done = threading.Event()

    def write() -> None:
        for run in runs:
            with attempt(run) as writing:
                for step in range(3):
                    writing.update(round=step)
                    writing.append_scalars({"step": step})
                writing.publish(record())
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        study = read_study(tmp_path)
        assert not study.problems
        assert len(study.runs) + len(study.unfinished) == 15
        for run in (*study.runs, *study.unfinished):
            steps = [row["step"] for row in run.scalars()]
            assert steps == list(range(len(steps)))
        for run in study.runs:
            assert run.classes().sizes["class"] == 4
            assert len(run.scalars()) == 3
    writer.join()


# ---- studies


def test_a_study_sorts_stacks_and_labels_its_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        for weight_decay in (0, 0.5):
            config = {"model": "tiny", "seed": seed, "weight_decay": weight_decay, "count": seed}
            run = Run.create(tmp_path, config | {"tags": [seed], "depth": 2, "name": f"s{seed}"})
            publish(run, record(seed=seed))
    pending = Run.create(tmp_path, CONFIG)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".0123456789ab.partial").mkdir()
    study = read_study(tmp_path)
    assert [r.id for r in study.runs] == sorted(r.id for r in study.runs)
    assert [r.id for r in study.unfinished] == [pending.id]
    assert study.problems == ()
    dataset = study.dataset()
    assert dataset["loss"].dims == ("run", "step", "class")
    assert dataset["class_count"].dims == ("run", "class")
    assert dataset["label"].dims == ("class",)
    assert dataset["count"].dtype == np.int64
    for name in ("seed", "weight_decay", "config_count", "tags", "name"):
        assert dataset[name].dims == ("run",)
    assert dataset["model"].item() == "tiny"
    assert dataset["depth"].item() == 2
    for run in study.runs:
        own = dataset.sel(run=run.id)
        assert own["seed"].item() == run.config["seed"]
        assert own["weight_decay"].item() == run.config["weight_decay"]
        np.testing.assert_array_equal(own["loss"].values, run.classes()["loss"].values)
    assert set(dataset.groupby("weight_decay").groups) == {0.0, 0.5}


def test_runs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, {"seed": seed}) for seed in range(3)]
    publish(runs[0], record())
    publish(runs[1], record(5))
    publish(runs[2], record(test_count=np.zeros((3, 4), dtype=int)))
    with pytest.raises(ValueError, match=f"{runs[1].id}.* differ in label: 5 classes"):
        stack(runs[:2])
    with pytest.raises(ValueError, match="different variables"):
        stack([runs[0], runs[2]])
    with pytest.raises(ValueError, match="no runs"):
        stack([])


def test_a_study_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        read_study(tmp_path / "nowhere")
    (tmp_path / "0123456789ab").mkdir()
    study = read_study(tmp_path)
    assert [path.name for path, _ in study.problems] == ["0123456789ab"]
    with pytest.raises(ValueError, match="no finished run"):
        study.dataset()


def test_validated_names_a_wrong_version() -> None:
    with pytest.raises(ValueError, match="format_version is 2"):
        validated(record().assign_attrs(format_version=2))
