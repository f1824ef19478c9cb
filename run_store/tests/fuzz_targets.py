"""The run store's readers: manifest, scalars, lease, class record, checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

from run_store import Run, read_study
from run_store.leases import Watch
from run_store.records import record_bytes
from run_store.runs import json_document, run_id
from run_store.saved_state import read_state, restore
from run_store.status import study_states, summary
from run_store.tests.fuzzing import Canary, Reader, Target
from run_store.tests.mutations import (
    mutate_in_place,
    mutate_json,
    mutate_lines,
    mutate_zip,
)
from run_store.tests.test_runs import record

CONFIG = {"model": "tiny", "weight_decay": 0.1, "seed": 0, "steps": 30, "betas": [0.9, 0.95]}


def _manifests() -> list[bytes]:
    base = {"format_version": 1, "run_id": run_id(CONFIG), "study": "s", "config": CONFIG}
    more = {"files": ["classes.nc"], "versions": {"python": "3"}, "error": "é", "parameters": 7}
    return [
        json_document(base | {"status": "new"}),
        json_document(base | more | {"status": "running", "label": "tiny, 0.1"}),
        json_document(base | more | {"status": "finished", "classes_sha256": "0" * 64}),
    ]


def _manifest_reader(folder: Path) -> Reader:
    canary = Canary(folder / "canary")
    run = Run(folder / "study" / run_id(CONFIG))
    run.folder.mkdir(parents=True)
    path = run.folder / "manifest.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        study = read_study(run.folder.parent)
        states = study_states(run.folder.parent, Watch(patience=0.0))
        summary(states)
        assert len(study.runs) + len(study.unfinished) + len(study.problems) == len(states) == 1
        canary.check("".join(reason for _, reason in study.problems))
        try:
            run.manifest  # noqa: B018
        except ValueError:
            assert states[0].status == "unreadable"
            raise
        json_document(run.manifest)

    return read


def _scalars_reader(folder: Path) -> Reader:
    run = Run.create(folder, CONFIG)
    path = run.folder / "scalars.jsonl"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        for row in run.scalars():
            json.dumps(row, allow_nan=False)  # as a resumed run writes them again

    return read


def _leases() -> list[bytes]:
    state = {
        "status": "running", "error": "", "beat": 3, "step": 20, "first_step": 0, "rate": "9 a s",
        "steps_per_second": 2.5, "host": "h", "pid": os.getpid(), "kernel": "k", "token": "t",
        "flock": True,
    }  # fmt: skip
    return [json.dumps(s).encode() for s in (state, state | {"status": "failed", "error": "no"})]


def _lease_reader(folder: Path) -> Reader:
    run = Run.create(folder / "study", CONFIG)
    path = run.folder / "attempts" / "0001" / "lease.json"
    path.parent.mkdir(parents=True)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        (state,) = study_states(folder / "study", Watch(patience=0.0))
        assert state.status in ("running", "lost", "failed", "diverged", "waiting")
        json_document(run.manifest)

    return read


def _records() -> list[bytes]:
    seeds = [record_bytes(record(size, size)) for size in (1, 4, 40)]
    empty = np.zeros((0, 4))
    counts = empty.astype(np.int64)
    seeds.append(record_bytes(record(steps=[], count=counts, loss=empty, accuracy=empty)))
    return seeds


def _record_reader(folder: Path) -> Reader:
    """Bytes whose SHA-256 the manifest agrees with, as a hostile one's would."""
    canary = Canary(folder / "canary")
    run = Run.create(folder / "study", CONFIG)
    path = run.folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"status": "finished"}

    def read(content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(manifest | {"classes_sha256": digest}))
        (run.folder / "classes.nc").write_bytes(content)
        try:
            run.classes()
        except ValueError as error:
            canary.check(str(error))
            raise

    return read


def _traps() -> list[bytes]:
    """Whole HDF5 with what ours never holds, as seeds for more of it."""
    traps = []
    for number in range(5):
        buffer = io.BytesIO(record_bytes(record()))
        with h5py.File(buffer, "r+") as file:
            del file["final_count"]
            if number == 0:
                file.create_dataset("final_count", (4,), "i8", external=[("/etc/passwd", 0, 32)])
            elif number == 1:
                file["final_count"] = h5py.SoftLink("/count")
            elif number == 2:
                layout = h5py.VirtualLayout((4,), "i8")
                layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
                file.create_virtual_dataset("final_count", layout)
            elif number == 3:
                file.create_dataset("final_count", (2**40,), "i8", chunks=(2**16,))
            else:
                file.create_group("final_count")["loop"] = h5py.SoftLink("/final_count")
        traps.append(buffer.getvalue())
    return traps


def _mutate_record(content: bytes, random: object) -> bytes:
    from random import Random

    assert isinstance(random, Random)
    if random.random() < 0.02:
        content = random.choice(TRAPS)
    return mutate_in_place(content, random)


TRAPS = _traps()


class _Parts:
    def __init__(self) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def named(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"model": self.model, "optimizer": self.optimizer}


def _checkpoints() -> list[bytes]:
    parts = _Parts()
    seeds = []
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save({n: p.state_dict() for n, p in parts.named().items()} | {"step": 3}, buffer)
        seeds.append(buffer.getvalue())
        parts.model(torch.ones(1, 3)).sum().backward()
        parts.optimizer.step()
    return seeds


class _Code:
    """What a hostile pickle does: it touches the canary when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _checkpoint_reader(folder: Path) -> Reader:
    canary = Canary(folder / "canary")
    path = folder / "state.pt"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            state = read_state(path)
            parts = _Parts()
            restore(parts.named(), state, path)
            parts.model(torch.ones(1, 3)).sum().backward()
            parts.optimizer.step()
        finally:
            canary.check("")

    buffer = io.BytesIO()
    torch.save({"model": _Code(canary.touched)}, buffer)
    with contextlib.suppress(ValueError):
        read(buffer.getvalue())
    return read


_STORE = ("run_store.runs", "run_store.input_files", "run_store.status")
TARGETS = [
    Target("manifest.json", _manifests, _manifest_reader, "manifest.json", mutate_json, _STORE),
    Target(
        "scalars.jsonl",
        lambda: [
            b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null, "rate": {"a": 1e-3}}\n',
            b"",
        ],
        _scalars_reader,
        "scalars.jsonl",
        mutate_lines,
        _STORE,
    ),
    Target(
        "lease.json",
        _leases,
        _lease_reader,
        "lease.json",
        mutate_json,
        ("run_store.leases", "run_store.status"),
    ),
    Target(
        "classes.nc",
        _records,
        _record_reader,
        "classes.nc",
        _mutate_record,
        (
            "run_store.records",
            "pyfive.high_level",
            "pyfive.dataobjects",
            "pyfive.h5d",
            "pyfive.btree",
            "pyfive.misc_low_level",
            "pyfive.datatype_msg",
        ),
    ),
    Target(
        "checkpoint.pt",
        _checkpoints,
        _checkpoint_reader,
        "state.pt",
        mutate_zip,
        ("run_store.saved_state", "torch._weights_only_unpickler"),
    ),
]
