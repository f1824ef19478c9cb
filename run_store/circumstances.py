"""How a run was done, for its manifest: what a stranger needs beside the config to repeat it."""

from __future__ import annotations

import contextlib
import functools
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from run_store.runs import Run

_Data = TypeVar("_Data")
_Config = TypeVar("_Config")


def circumstances(packages: Sequence[str], device: torch.device, **fields: Any) -> dict[str, Any]:
    """Versions of Python and of `packages`, device, host, commit and time; `fields` join them."""
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "host": socket.gethostname(),
        "git_commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    }


def command_line() -> str:
    """This process's command as one can type it again."""
    return shlex.join(["python", *sys.orig_argv[1:]])


@functools.cache
def git_commit() -> str | None:
    """The commit of the code, ending in "+" where files differ from it; None without git."""
    git = ("git", "-C", str(Path(__file__).parent))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
        commit: str = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **options).stdout
        return commit + ("+" if changed else "")
    return None


def absolute(data: Any) -> Any:
    """A dataclass of what a run's data are and where, with absolute paths."""
    paths = {n: v.resolve() for n, v in vars(data).items() if isinstance(v, Path)}
    return replace(data, **paths)


def places(data: Any) -> dict[str, Any]:
    """Such a dataclass as JSON holds it."""
    described = asdict(absolute(data))
    return {n: str(v) if isinstance(v, Path) else v for n, v in described.items()}


def of_manifest(
    run: Run, data_type: type[_Data], config_type: type[_Config]
) -> tuple[_Data, _Config]:
    """A run's data and config from its manifest, as `places` and `Run.create` put them there.

    A config may hold more than the fields of `config_type`, which stand for what it was given, and
    may lack those that `config_type.added` names, which are at their defaults then.

    Raises:
        ValueError: the manifest does not hold them, or not as this version has them.
    """
    manifest = run.manifest
    where, config = manifest.get("data"), manifest["config"]
    if not isinstance(where, dict):
        raise ValueError(f"{run.folder} does not say where its data are; sweep again instead")
    folders = {n: Path(where[n]) for n in where if n.endswith("_dir") and where[n] is not None}
    names = {field.name for field in fields(config_type)}  # type: ignore[arg-type]
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in config.items()}
    expected = names - (set(getattr(config_type, "added", ())) - set(given))
    try:
        return data_type(**(where | folders)), config_type(**{n: given[n] for n in expected})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{run.folder} was made by another version: {error}") from None
