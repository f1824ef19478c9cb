"""The run store: one folder a run, named by its config, whose files are the truth.

    <study>/<run-id>/manifest.json   config, status and circumstances of the run
    <study>/<run-id>/scalars.jsonl   one JSON object a line and evaluation step
    <study>/<run-id>/classes.nc      the per-class record
    <study>/<run-id>/attempts/       who tried, and how it went (see attempts.py, which writes)

A run's id is the hash of its config. Its manifest is written when it is created and when it is
finished, when scalars and record join it; until then the newest attempt tells how the run stands.
Every file but scalars.jsonl is written beside and renamed into place, so a reader sees a whole
file or none; a torn last line of scalars.jsonl is dropped. The manifest of a finished run holds
the SHA-256 of its classes.nc, which a reader checks before it parses the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from run_store.input_files import is_integer, is_number, parse_json, read_file
from run_store.leases import attempt_folders, read_lease, rename_exclusively
from run_store.records import FORMAT_VERSION, from_bytes

STATUSES = ("new", "running", "waiting", "finished", "failed", "diverged")

_RUN_ID = re.compile(r"[0-9a-f]{12}")
_MOST_MANIFEST_BYTES, _MOST_SCALARS_BYTES, _MOST_RECORD_BYTES = 2**24, 2**30, 2**33


def run_id(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of the config as canonical JSON.

    Keys are sorted and equal numbers are one number (1.0 is 1, -0.0 is 0), so the id depends
    neither on the order of the fields nor on how a number was spelled. Raises ValueError for what
    JSON cannot hold: NaN, infinities, keys that are not strings, other objects.
    """
    try:
        text = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"config cannot be written as JSON: {error}") from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


class Run:
    """One run's folder, to read; whoever writes holds an `attempt`."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not _RUN_ID.fullmatch(self.id):
            raise ValueError(f"{self.folder} is not a run: expected a name of 12 hex digits")

    @classmethod
    def create(cls, study_folder: Path | str, config: Mapping[str, Any], **fields: Any) -> Run:
        """The run of this config in a study; its folder and manifest appear at once.

        `fields` join the manifest (versions, device, ...). If the run is already there it is
        returned as it is, with a new manifest in place of one that is missing or torn. Raises
        ValueError for a config that JSON cannot hold, OSError where the folder cannot be written.
        """
        study = Path(study_folder)
        run = cls(study / run_id(config))
        if run._is_there():
            return run
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": run.id,
            "study": study.resolve().name,
            "config": config,
            "status": "new",
        }
        content = json_document(manifest | fields)
        study.mkdir(parents=True, exist_ok=True)
        newborn = study / f".{run.id}.{secrets.token_hex(4)}.partial"
        try:
            newborn.mkdir()
            write_atomically(newborn / "manifest.json", content)
            # Another process may have created the same run meanwhile, or its manifest was lost.
            is_new = rename_exclusively(newborn, run.folder)
            if not is_new and not run._is_there():
                write_atomically(run._manifest_path, content)
            sync_folder(study)
        finally:
            shutil.rmtree(newborn, ignore_errors=True)
        return run

    @property
    def id(self) -> str:
        """The name of the folder: the hash of the config."""
        return self.folder.name

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json holds, and until the run is finished what its newest attempt adds.

        ValueError, naming the file, if it is missing or not ours.
        """
        manifest = self.stored_manifest
        attempts = attempt_folders(self.folder / "attempts")
        if manifest["status"] == "finished" or not attempts:
            return manifest
        fields: dict[str, Any] = {}
        with contextlib.suppress(ValueError, OSError):
            fields = read_json(attempts[-1] / "manifest.json")
        lease = read_lease(attempts[-1])
        status, error = lease.get("status"), lease.get("error")
        state = {
            # What is published has its status in manifest.json: this one is on its way there.
            "status": status if status in STATUSES and status != "finished" else "running",
            "error": error if isinstance(error, str) and error else None,
        }
        return fields | manifest | state

    @property
    def stored_manifest(self) -> dict[str, Any]:
        """What manifest.json holds, whatever the attempts say. Raises as `manifest`."""
        path = self._manifest_path
        if self.folder.is_symlink():  # what is written through it would land outside the study
            raise ValueError(f"{self.folder} is a symbolic link; expected a folder of its own")
        manifest = read_json(path)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}")
        config, status = manifest.get("config"), manifest.get("status")
        if not isinstance(config, dict) or not isinstance(status, str) or status not in STATUSES:
            raise ValueError(f"{path}: no config, or status {status!r} not one of {STATUSES}")
        try:
            owner = run_id(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if manifest.get("run_id") != self.id or owner != self.id:
            raise ValueError(f"{path}: belongs to the run {owner}, not to {self.id}")
        return manifest

    def _is_there(self) -> bool:
        """Whether there is a manifest: one that is not even JSON was half written, and is not."""
        try:
            read_json(self._manifest_path)
        except ValueError:
            return False
        return True

    @property
    def config(self) -> dict[str, Any]:
        """The manifest's config."""
        config = self.manifest["config"]
        assert isinstance(config, dict)
        return config

    @property
    def status(self) -> str:
        """ "new", "running", "waiting", "finished", "failed" or "diverged".

        A running one may have died: `status` tells.
        """
        return str(self.manifest["status"])

    def is_done(self) -> bool:
        """Whether the run needs nothing more: it diverged, or its record is there and whole.

        A record that was damaged is named on stderr. Its bytes are compared with what was
        published and not unpacked, which would take a sweep of many runs minutes.
        """
        if self.status != "finished":
            return self.status == "diverged"
        try:
            self._checked_classes()
        except ValueError as error:
            print(f"doing run {self.id} again: {error}", file=sys.stderr)
            return False
        return True

    def scalars(self) -> list[dict[str, Any]]:
        """Every line so far, without a torn last one. ValueError for a line that is not ours."""
        folders = [self.folder, *reversed(attempt_folders(self.folder / "attempts"))]
        paths = [folder / "scalars.jsonl" for folder in folders]
        return read_scalars(next((path for path in paths if path.exists()), paths[0]))

    def classes(self, only: Collection[str] | None = None) -> xr.Dataset:
        """The published record, in memory; or `only` these of its variables, label and step.

        Raises ValueError, naming the file, if the run is not finished, or the file is missing,
        cut short or not the one that the manifest speaks of.
        """
        content = self._checked_classes()
        try:
            return from_bytes(content, only)
        except ValueError as error:
            raise ValueError(f"{self._classes_path}: {error}") from None

    def _checked_classes(self) -> bytes:
        path, manifest = self._classes_path, self.manifest
        if manifest["status"] != "finished":
            raise ValueError(f"{path}: the run is {manifest['status']}, not finished")
        try:
            content = _read_own(path, _MOST_RECORD_BYTES)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing, though the run is finished") from None
        if sha256(content) != manifest.get("classes_sha256"):
            raise ValueError(
                f"{path}: cut short or changed since it was published ({len(content)} bytes, "
                "SHA-256 differs from the manifest's)"
            )
        return content

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def _classes_path(self) -> Path:
        return self.folder / "classes.nc"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's folder holds. `problems` are (path, reason) of what could not be read."""

    folder: Path
    runs: tuple[Run, ...]
    """Finished runs whose record is whole, sorted by id."""
    unfinished: tuple[Run, ...]
    problems: tuple[tuple[Path, str], ...]

    def dataset(self) -> xr.Dataset:
        """All finished runs along `run`; see `stack`. ValueError if there is none."""
        if not self.runs:
            raise ValueError(f"{self.folder} has no finished run")
        return stack(self.runs)


def read_study(folder: Path | str, *, check_records: bool = True) -> Study:
    """Read every run of a study. ValueError if the folder is missing; nothing else stops it.

    Without `check_records` a finished run is taken at its manifest's word: whoever reads its
    record will see.
    """
    finished, unfinished, problems = [], [], []
    for path in run_folders(folder):
        try:
            run = Run(path)
            if run.status == "finished":
                if check_records:
                    run._checked_classes()
                finished.append(run)
            else:
                unfinished.append(run)
        except (ValueError, OSError) as error:
            problems.append((path, str(error)))
    problems += [(path, "its name is no run's id") for path in _misnamed_runs(Path(folder))]
    return Study(
        folder=Path(folder),
        runs=tuple(finished),
        unfinished=tuple(unfinished),
        problems=tuple(problems),
    )


def run_folders(folder: Path | str) -> list[Path]:
    """The folders of a study's runs, sorted by id. ValueError if the study's folder is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a study: expected a folder of runs")
    return [path for path in sorted(folder.iterdir()) if _RUN_ID.fullmatch(path.name)]


def _misnamed_runs(folder: Path) -> list[Path]:
    """Folders that hold a run under a name that is no id, as a copy of one does."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")  # a run that is being made
        and not _RUN_ID.fullmatch(path.name)
        and (path / "manifest.json").is_file()
    ]


def stack(runs: Sequence[Run]) -> xr.Dataset:
    """The records of `runs` along a new dimension `run`, with the config fields as coordinates.

    A field that varies is a coordinate along `run`, one that does not is a scalar coordinate; a
    field named like a variable or dimension becomes ``config_<name>``. Raises ValueError where
    the runs do not share their classes (labels) and evaluation steps.
    """
    if not runs:
        raise ValueError("no runs to stack; expected at least one")
    datasets = [run.classes() for run in runs]
    first = datasets[0]
    for run, dataset in zip(runs, datasets, strict=True):
        for name in ("label", "step"):
            if not np.array_equal(dataset[name].values, first[name].values):
                raise ValueError(
                    f"{run.folder} and {runs[0].folder} differ in {name}: "
                    f"{dataset.sizes['class']} classes over {dataset.sizes['step']} steps, "
                    f"against {first.sizes['class']} over {first.sizes['step']}"
                )
        if set(dataset.data_vars) != set(first.data_vars):
            raise ValueError(f"{run.folder} and {runs[0].folder} hold different variables")
    stacked = xr.Dataset(attrs=first.attrs)
    stacked["label"] = first["label"]
    stacked.coords["step"] = first["step"].values
    stacked.coords["run"] = np.array([run.id for run in runs], dtype=object)
    for name in map(str, first.data_vars):
        if name != "label":
            values = np.stack([dataset[name].values for dataset in datasets])
            stacked[name] = (("run", *first[name].dims), values)
    taken = {*map(str, stacked.variables), *map(str, stacked.dims)}
    return stacked.assign_coords(_config_coordinates(runs, taken))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush to the disk and rename into place: readers see the old file or the new.

    A write that fails (a full disk, say) raises OSError naming `path` and leaves nothing behind.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise naming(error, path) from None
        raise
    sync_folder(path.parent)


def _config_coordinates(runs: Sequence[Run], taken: set[str]) -> dict[str, Any]:
    configs = [run.config for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    coordinates: dict[str, Any] = {}
    for name in names:
        values = [config.get(name) for config in configs]
        numbers = all(map(is_number, values))
        if not numbers:
            values = [v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values]
        column = np.array(values, dtype=None if numbers else object)
        key = f"config_{name}" if name in taken else name
        varies = any(value != values[0] for value in values)
        coordinates[key] = ("run", column) if varies else ((), column[0])
    return coordinates


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"config key {wrong[0]!r} is not a string")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"config holds {value}; expected finite numbers")
        return int(value) if value.is_integer() else value
    return value


def json_document(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is stored. ValueError for what JSON cannot hold."""
    try:
        return (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode("ascii")
    except TypeError as error:
        raise ValueError(f"manifest cannot be written as JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming the file, for anything else."""
    try:
        content = _read_own(path, _MOST_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: missing") from None
    return parse_json(content, str(path))


def _read_own(path: Path, most_bytes: int) -> bytes:
    return read_file(path, most_bytes=most_bytes, follow_links=False)


def read_scalars(path: Path) -> list[dict[str, Any]]:
    """The lines of a scalars.jsonl, [] where there is none; see `Run.scalars`."""
    try:
        content = _read_own(path, _MOST_SCALARS_BYTES)
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        row = parse_json(line, f"{path}, line {number}")
        if not is_integer(row.get("step")):
            raise ValueError(f"{path}, line {number}: no integer step")
        rows.append(row)
    return rows


def sha256(content: bytes) -> str:
    """The SHA-256 as hex digits."""
    return hashlib.sha256(content).hexdigest()


def naming(error: OSError, path: Path) -> OSError:
    """The same error, with the path that it is about."""
    return type(error)(error.errno, error.strerror, str(path))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
