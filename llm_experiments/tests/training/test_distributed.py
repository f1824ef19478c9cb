"""Two processes with gloo against one: the same losses, checkpoints and files."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_experiments.__main__ import main
from llm_experiments.configs import DataConfig, Parallel, RunConfig
from llm_experiments.text.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.training.distributed import ALONE, Follower, Group, join
from llm_experiments.training.loop import Progress, train
from run_store import Run, Stopped, attempt, read_study
from run_store.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[3]
BASE = RunConfig(steps=10, batch_size=4, evaluate_every=4, learning_rate=3e-3, weight_decay=0.3)
CASES: dict[str, tuple[Parallel, RunConfig]] = {
    "ddp": ("ddp", replace(BASE, evaluate="full")),
    # Adam does not mind how large gradients are; an L2 term beside them does.
    "untied": ("ddp", replace(BASE, tie_embeddings=False, decay_mode="l2")),
    "accumulated": ("fsdp", replace(BASE, model="qwen2-tiny", accumulation=2, decay_mode="l2")),
    "half": ("fsdp", replace(BASE, precision="fp16", clip_gradient=0.5)),
    # A step of SGD is as long as its gradient, clipped by a norm over all processes.
    "clipped": ("ddp", replace(BASE, optimizer="sgd", decay_mode="l2", clip_gradient=0.5)),
    "clipped-parts": ("fsdp", replace(BASE, optimizer="sign", clip_gradient=0.5)),
    "muon": ("ddp", replace(BASE, optimizer="muon")),
    "rows": ("fsdp", replace(BASE, optimizer="lion", decay_exponent=1.0, decay_until=0.7)),
    "cautious": (
        "fsdp",
        replace(BASE, optimizer="adamw-cautious", decay_exponent=0.5, tie_embeddings=False),
    ),
}
STOP = 6


def run_one(case: str, folder: Path, corpus: PreparedCorpus, group: Group, stop: int = 0) -> None:
    """One case by this process, in a folder of its own; stopped with a checkpoint after a step."""
    config, device = CASES[case][1], torch.device("cpu")
    if not group.leads:
        folders = group.tell(None)
        with suppress(Stopped):
            train(config, corpus, Follower(folders), device=device, keep_model=True, group=group)
        return
    run = Run.create(folder, {"case": case})
    with suppress(Stopped), attempt(run) as mine:
        if group.size > 1:
            group.tell(mine.folders())

        def report(progress: Progress) -> None:
            if progress.step == stop:
                mine.lease.stop.set()

        train(config, corpus, mine, device=device, report=report, keep_model=True, group=group)


def one_of_two(rank: int, port: int, folder: Path, corpus: Path) -> None:
    """A process of the group: every case undisturbed, and stopped and done on."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    prepared = load_prepared(corpus)
    CheckpointWriter.is_due = lambda writer, step: step == STOP - 1  # type: ignore[method-assign]
    for case, (parallel, _) in CASES.items():
        group = join(parallel, "cpu")
        run_one(case, folder / "whole", prepared, group)
        run_one(case, folder / "stopped", prepared, group, stop=STOP)
        if rank == 0:
            stopped = only_run(folder / "stopped", case).folder
            shutil.copytree(stopped, folder / "alone" / stopped.name)
        run_one(case, folder / "stopped", prepared, group)
    os._exit(0)  # as `run_store.command_line.leave` does


def only_run(folder: Path, case: str) -> Run:
    return Run.create(folder, {"case": case})


@pytest.fixture(scope="module")
def uneven(data: DataConfig) -> PreparedCorpus:
    """23 sequences: the last batch of an evaluation has three, for two processes."""
    return prepare(replace(data, num_sequences=23))


@pytest.fixture(scope="module")
def by_two(uneven: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by-two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, folder, uneven.folder)
    torch.multiprocessing.spawn(one_of_two, arguments, nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(
    case: str, by_two: Path, uneven: PreparedCorpus, tmp_path: Path
) -> None:
    run_one(case, tmp_path, uneven, ALONE)
    alone, together = only_run(tmp_path, case).classes(), only_run(by_two / "whole", case).classes()
    # Muon's products have the 8 bits of bfloat16 whatever the precision.
    rtol = 2e-2 if case in ("half", "muon") else 1e-4
    assert set(alone) == set(together)
    for name in alone:
        if alone[name].dtype == np.int64:
            np.testing.assert_array_equal(together[name], alone[name], err_msg=name)
        elif name.endswith("loss"):
            np.testing.assert_allclose(together[name], alone[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_to_the_same_bytes(case: str, by_two: Path) -> None:
    whole, stopped = (only_run(by_two / name, case) for name in ("whole", "stopped"))
    assert (stopped.folder / "classes.nc").read_bytes() == (
        whole.folder / "classes.nc"
    ).read_bytes()


@pytest.mark.parametrize("case", ["untied", "half"])
def test_one_process_goes_on_where_two_stopped(
    case: str, by_two: Path, uneven: PreparedCorpus, tmp_path: Path
) -> None:
    shutil.copytree(by_two / "alone", tmp_path, dirs_exist_ok=True)
    run = only_run(tmp_path, case)
    steps = []
    with attempt(run) as mine:
        train(
            CASES[case][1],
            uneven,
            mine,
            device=torch.device("cpu"),
            report=lambda progress: steps.append(progress.step),
        )
    assert steps == list(range(STOP + 1, BASE.steps + 1))
    whole = only_run(by_two / "whole", case).classes()
    np.testing.assert_allclose(run.classes()["final_loss"], whole["final_loss"], rtol=2e-2)
    np.testing.assert_array_equal(run.classes()["count"], whole["count"])


@pytest.mark.parametrize("case", ["untied", "accumulated"])
def test_the_model_that_is_kept_is_whole(case: str, by_two: Path, uneven: PreparedCorpus) -> None:
    folder = only_run(by_two / "whole", case).folder / "model"
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values())
    tokens = torch.from_numpy(uneven.tokens.astype(np.int64))
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    final = only_run(by_two / "whole", case).classes()
    counts = final["final_count"].values
    mean = np.nansum(final["final_loss"].values * counts) / counts.sum()
    assert loss == pytest.approx(mean, rel=1e-4)


def arguments_of(data: DataConfig, runs_dir: Path, *more: str) -> list[str]:
    return [
        *("sweep", "--study", "s", "--runs-dir", str(runs_dir), "--model", "openelm-tiny"),
        *("--weight-decay", "0", "1", "--steps", "6", "--batch-size", "4", "--device", "cpu"),
        *("--evaluate-every", "3", "--corpus", "text", "--data-dir", str(data.data_dir)),
        *("--cache-dir", str(data.cache_dir), "--vocab-size", "300", "--context", "16"),
        *("--num-sequences", "24", "--loss-weight-exponent", "0", *more),
    ]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.run(
        [sys.executable, *launcher, "-m", "llm_experiments", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_same_sweep_under_torchrun(data: DataConfig, tmp_path: Path) -> None:
    ended = torchrun(arguments_of(data, tmp_path / "two"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("2 finished") == 1
    assert main(arguments_of(data, tmp_path / "one")) == 0
    studies = [read_study(tmp_path / name / "s") for name in ("one", "two")]
    assert [run.id for run in studies[0].runs] == [run.id for run in studies[1].runs]
    assert {run.manifest.get("processes") for run in studies[1].runs} == {2}
    one, two = (study.dataset()["final_loss"].values for study in studies)
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_batch_that_cannot_be_shared_is_one_line(data: DataConfig, tmp_path: Path) -> None:
    ended = torchrun(arguments_of(data, tmp_path, "--batch-size", "3"))
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: batch_size is 3; expected a multiple of the 2 processes"]
