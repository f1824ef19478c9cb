"""From the run store to labelled datasets, one for each set of comparable runs.

Runs are comparable when they differ in `weight_decay` and `seed` alone: same remaining config,
same recorded steps, same classes, counts and labels. Every run is read once and reduced at once,
so that time and memory grow linearly with the number of runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from frequency_bins import (
    FrequencyBins,
    average_loss,
    bin_summary,
    carry_back,
    carry_forward,
    learning_speed,
    perplexity,
    token_balanced_accuracy,
    token_balanced_loss,
)
from llm_experiments.training.kappa import kappa
from reports.configs import check_config
from reports.excess import excess_variables
from reports.groups import (
    MOST_NAMED_CLASSES,
    effective_counts,
    group_dataset,
    loss_weight_exponent,
    named,
    welch_half_width,
)
from reports.last_layers import geometry_variables
from reports.ranks import by_rank, shared_settings
from reports.tasks import measured_folders, task_variables
from reports.workers import PARALLEL_FROM, parallel_map
from run_store import Run, read_study
from run_store.leases import Watch
from run_store.shrunken import ShrunkenRun, shrunken_runs
from run_store.status import study_states
from ufm import fit_critical_count

SWEPT = ("weight_decay", "seed")
CHECKPOINTS = 12
# What a report needs of a record; its counts and accuracies by window stay packed.
NEEDED = (
    *("class_count", "loss", "final_count", "final_loss", "final_accuracy"),
    *("test_count", "test_accuracy"),
)
BY_CLASS = ("loss", "accuracy", "learning_speed", "windows_seen")
BIN_BASE = 3
NOT_EVALUATED = (
    "finished with --evaluate stream, which has no final losses; run it with --evaluate final"
)


@dataclass(frozen=True, kw_only=True)
class RunNote:
    """One line about a run that gives no numbers: its status, what it is, where and why."""

    status: str
    what: str
    path: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Everything that the studies hold: groups of comparable runs, and what is not in them.

    `groups`: datasets as `group_dataset` makes them, in the order of their names. `manifests`:
    of every run that is in a group, by run id. `unfinished`: new, running, lost, failed or
    diverged runs, those without a final evaluation (`--evaluate stream`), and those that the grid
    of weight decays and seeds lacks. `problems`: unreadable files.
    """

    studies: tuple[str, ...]
    groups: tuple[xr.Dataset, ...]
    manifests: Mapping[str, Mapping[str, Any]]
    unfinished: tuple[RunNote, ...]
    problems: tuple[RunNote, ...]
    downstream: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the runs that were measured on tasks, by run id."""


def collect(folders: Sequence[Path]) -> Collection:
    """Read studies and group their runs.

    Raises ValueError for a folder that does not exist or holds no run; whatever is wrong inside a
    study is reported in the result instead.
    """
    found: dict[str, tuple[Path, Run | ShrunkenRun, dict[str, Any]]] = {}
    problems: list[RunNote] = []
    lost: dict[str, str] = {}
    for folder in folders:
        study = read_study(folder, check_records=False)
        shrunken = shrunken_runs(folder)
        if not (study.runs or study.unfinished or study.problems or shrunken):
            raise ValueError(f"{folder} is not a study: it holds no runs; expected runs/<study>")
        problems += [_problem(folder, path, reason) for path, reason in study.problems]
        if study.unfinished:
            states = study_states(folder, Watch())
            lost |= {state.run.id: state.note for state in states if state.status == "lost"}
        for run in (*study.runs, *study.unfinished, *shrunken):
            try:
                manifest = run.manifest
                check_config(manifest["config"])
                if run.id in found:
                    raise ValueError(f"a second run {run.id}; the first one found is used")
                found[run.id] = folder, run, manifest
            except (ValueError, OSError) as error:
                problems.append(_problem(folder, run.folder, str(error)))
    finished = [entry for entry in found.values() if _has_a_final_loss(entry[2])]
    tasks = [(run, manifest) for _, run, manifest in finished]
    results = parallel_map(_reduced, tasks, worth=PARALLEL_FROM)
    reduced: dict[tuple[str, str], list[xr.Dataset]] = {}
    shared: dict[str, xr.Dataset] = {}
    for (folder, run, manifest), result in zip(finished, results, strict=True):
        if isinstance(result, str):
            problems.append(_problem(folder, run.folder, result))
            del found[run.id]
        else:
            dataset, digest = result
            # One copy of what comparable runs share, above all the strings.
            same = shared.setdefault(digest, dataset)
            dataset = dataset.assign_coords(
                {name: same[name].variable for name in ("label", "class_count")}
            )
            reduced.setdefault((_settings(manifest["config"]), digest), []).append(dataset)
    unfinished = [_unfinished(*entry, lost) for entry in found.values() if entry not in finished]
    return Collection(
        studies=tuple(folder.resolve().name for folder in folders),
        groups=named([_group(key[0], reduced.pop(key)) for key in list(reduced)]),
        manifests={run.id: manifest for _, run, manifest in finished if run.id in found},
        unfinished=(
            *unfinished,
            *_missing([manifest["config"] for *_, manifest in found.values()]),
        ),
        problems=tuple(problems),
        downstream=measured_folders([(run.id, run.folder) for _, run, _ in finished]),
    )


def _group(settings: str, runs: Sequence[xr.Dataset]) -> xr.Dataset:
    group = group_dataset(json.loads(settings), runs)
    return group.assign(excess_variables(group))


def joined(*sides: Collection) -> Collection:
    """Collections as one, every group named after its study too."""
    groups = [
        group.assign_attrs(name=f"{study}: {group.attrs['name']}", study=study)
        for side in sides
        for study in ["/".join(side.studies)]
        for group in side.groups
    ]
    return Collection(
        studies=tuple(study for side in sides for study in side.studies),
        groups=tuple(groups),
        manifests={run: manifest for side in sides for run, manifest in side.manifests.items()},
        unfinished=tuple(note for side in sides for note in side.unfinished),
        problems=tuple(note for side in sides for note in side.problems),
        downstream={run: path for side in sides for run, path in side.downstream.items()},
    )


def _reduced(task: tuple[Run | ShrunkenRun, Mapping[str, Any]]) -> tuple[xr.Dataset, str] | str:
    try:
        return reduce_run(*task)
    except (ValueError, OSError) as error:
        return str(error)


def reduce_run(run: Run | ShrunkenRun, manifest: Mapping[str, Any]) -> tuple[xr.Dataset, str]:
    """What the report needs of one run, and a digest of what comparable runs must share.

    Raises ValueError for a record without a final loss, and what `Run.classes` raises.
    """
    record = by_rank(run.classes(only=NEEDED), manifest["config"])
    steps, counts = record["step"].values, record["class_count"].values
    final_count, loss, accuracy = _final(record)
    if not final_count.any() or not counts.any():
        raise ValueError(f"{run.folder}: no class has a final loss")
    trajectory, windows = carry_forward(record["loss"].values)
    carried_back = carry_back(record["loss"].values)
    values = {
        "loss": loss,
        "accuracy": accuracy,
        "learning_speed": _speed(steps, trajectory),
        "speed_carried_back": _speed(steps, carried_back),
        "windows_seen": np.where((counts > 0) & windows.any(), windows / len(steps), math.nan),
    }
    # The recorded steps that the page keeps: the first, the last, evenly between.
    picked = np.unique(np.linspace(0, len(steps) - 1, CHECKPOINTS).round().astype(int))
    bins = FrequencyBins.powers(counts, base=BIN_BASE)
    data = xr.Dataset(
        {
            **{name: ("class", values[name]) for name in BY_CLASS},
            "test_accuracy": ("class", _last_test_accuracy(record)),
            # For a line that one looks at: half precision will do, and above 100 nats is above.
            "trajectory": (
                ("checkpoint", "class"),
                np.minimum(trajectory[picked], 100).astype(np.float16),
            ),
            **_scalars(manifest["config"], record),
            **_bin_variables(bins, values),
            **_few_classes(run, record),
            **task_variables(run.folder, counts, loss, bins),
        },
        coords={
            "class_count": ("class", counts),
            "label": record["label"].variable,
            "step": ("checkpoint", steps[picked]),
            "bin_low": ("bin", np.array(bins.edges[:-1])),
            "bin_high": ("bin", np.array(bins.edges[1:])),
            "bin_size": ("bin", bins.sizes.numpy()),
            "bin_share": ("bin", bins.token_share.numpy()),
        },
        attrs={
            "run": run.id,
            "cell": _cell(manifest["config"]),
            "class_names": record.attrs.get("class_names", []),
        },
    )
    names = record["label"].values.tolist() + data.attrs["class_names"]
    digest = hashlib.sha256(repr(names).encode("ascii", "backslashreplace"))
    for part in (steps, counts):
        digest.update(part.tobytes())
    digest.update(str(manifest.get("data_hash")).encode())
    return data, digest.hexdigest()


def _few_classes(run: Run | ShrunkenRun, record: xr.Dataset) -> dict[str, Any]:
    """What only runs of few classes have: which class has a rank, and their last layer."""
    counts = record["class_count"].values
    if len(counts) > MOST_NAMED_CLASSES:
        return {}
    ranked = "class_index" in record
    index = record["class_index"].values if ranked else np.arange(len(counts))
    geometry = geometry_variables(run, counts, index)
    return geometry | ({"class_index": ("class", index)} if ranked else {})


def _final(record: xr.Dataset) -> list[np.ndarray]:
    """Count, loss and accuracy of the classes after the last step."""
    return [record[f"final_{name}"].values for name in ("count", "loss", "accuracy")]


def _last_test_accuracy(record: xr.Dataset) -> np.ndarray:
    """(class): accuracy on test data in the last window; NaN where the run has none."""
    if "test_accuracy" in record:
        return np.asarray(record["test_accuracy"].values[-1])
    return np.full(record.sizes["class"], math.nan)


def _scalars(config: Mapping[str, Any], record: xr.Dataset) -> dict[str, float]:
    counts = record["class_count"].values
    final_count, loss, accuracy = _final(record)
    balanced = float(token_balanced_loss(final_count, loss))
    occurs = np.isfinite(loss) & (counts > 0)
    scalars = {
        "average_loss": float(average_loss(final_count, loss)),
        "token_balanced_loss": balanced,
        "token_balanced_perplexity": float(perplexity(balanced)),
        "token_balanced_accuracy": float(token_balanced_accuracy(final_count, accuracy)),
        "neglected": float(np.count_nonzero(accuracy[occurs] == 0)),
        "kappa": kappa(config),
    }
    effective = effective_counts(counts, counts, loss_weight_exponent(config))[occurs]
    # The mean of n losses varies as 1/n, so each class weighs by its count.
    fit = fit_critical_count(
        effective, loss[occurs], vocab_size=len(counts), weights=counts[occurs]
    )
    return scalars | {
        "critical_count": fit.critical_count,
        "r_squared": fit.r_squared,
        "predicted_neglected": float(np.count_nonzero(effective <= fit.critical_count)),
    }


def _speed(steps: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """NaN where one record alone was made."""
    return learning_speed(steps, losses) if len(steps) > 1 else np.full(losses.shape[1:], math.nan)


def _bin_variables(bins: FrequencyBins, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for name, of_classes in values.items():
        summary = bin_summary(bins, of_classes)
        variables[f"bin_{name}"] = ("bin", summary.mean)
        variables[f"bin_{name}_std"] = ("bin", summary.std)
    index, loss = bins.index.numpy(), values["loss"]
    ends = [loss[index == place] for place in (index[index >= 0].min(), index.max())]
    ends = [end[np.isfinite(end)] for end in ends]
    variables["fairness_gap"] = float(ends[0].mean() - ends[1].mean())
    variables["fairness_gap_half_width"] = welch_half_width(*ends)
    return variables


def _settings(config: Mapping[str, Any]) -> str:
    shared = {k: value for k, value in shared_settings(config).items() if k not in SWEPT}
    return json.dumps(shared, sort_keys=True)


def _cell(config: Mapping[str, Any]) -> tuple[float, int]:
    return float(config["weight_decay"]), int(config["seed"])


def _missing(configs: Iterable[Mapping[str, Any]]) -> list[RunNote]:
    """The cells that a full grid of each setting's weight decays and seeds would have."""
    grids: dict[str, set[tuple[float, int]]] = {}
    for config in configs:
        grids.setdefault(_settings(config), set()).add(_cell(config))
    notes = []
    for settings, cells in grids.items():
        config = json.loads(settings)
        grid = itertools.product(*(sorted(set(axis)) for axis in zip(*cells, strict=True)))
        notes += [
            RunNote(status="missing", what=_what(config | {"weight_decay": decay, "seed": seed}))
            for decay, seed in grid
            if (decay, seed) not in cells
        ]
    return notes


def _unfinished(
    folder: Path, run: Run, manifest: Mapping[str, Any], lost: Mapping[str, str]
) -> RunNote:
    status, reason = manifest["status"], str(manifest.get("error") or "")
    if run.id in lost:
        status, reason = "lost", lost[run.id]
    elif status == "finished":
        status, reason = "not evaluated", NOT_EVALUATED
    what, path = _what(manifest["config"]), f"{folder.name}/{run.id}"
    return RunNote(status=status, what=what, path=path, reason=reason)


def _has_a_final_loss(manifest: Mapping[str, Any]) -> bool:
    """Finished, and the training set was measured at the end."""
    return manifest["status"] == "finished" and manifest["config"].get("evaluate") != "stream"


def _problem(folder: Path, path: Path, reason: str) -> RunNote:
    reason = reason.replace(f"{folder}/", "")
    return RunNote(status="unreadable", what="", path=f"{folder.name}/{path.name}", reason=reason)


def _what(config: Mapping[str, Any]) -> str:
    decay, seed = _cell(config)
    return f"{config.get('model', 'model')}, weight decay {decay:g}, seed {seed}"
