"""One run on several processes: DDP, or FSDP2 for models that do not fit on one GPU.

    torchrun --nproc-per-node 2 -m llm_experiments train|sweep [--parallel fsdp] ...

The first process does the sweep as it would alone; the others follow it from run to run, compute
their share of every batch and write nothing. Batches, weights and the order of the data are those
of a single process: process r of W takes sequences r, r + W, ... of a batch, gradients are summed,
and so are the token metrics (int64 counts, float64 losses). What differs is rounding, so how many
processes there were is told in the manifest and is no part of the run's id. Checkpoints are those
of a single process, too: a run can go on with another number of processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from frequency_bins import ClassMetrics
from llm_experiments.configs import Parallel
from llm_experiments.text.tokenization import PAD_ID
from run_store.attempts import error_line
from run_store.checkpoint_writer import snapshot
from run_store.devices import resolve_device

# Followers wait while the first process prepares a corpus. That a process has died is noticed by
# torchrun and by closed connections, not by this.
_TIMEOUT = timedelta(days=1)


class GroupBroken(ConnectionError):
    """Another process of the group has ended."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that do a run together: this one's rank, how many they are, and how."""

    rank: int = 0
    size: int = 1
    parallel: Parallel = "ddp"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each process keeps only its part of the parameters."""
        return self.size > 1 and self.parallel == "fsdp"

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of sequences (B, T), as many as any other's: padding fills it up."""
        if self.size == 1:
            return batch
        missing = -len(batch) % self.size
        return F.pad(batch, (0, 0, 0, missing), value=PAD_ID)[self.rank :: self.size]

    def wrap(
        self, model: nn.Module, layers: Sequence[nn.Module], device: torch.device
    ) -> nn.Module:
        """The model as DDP or FSDP2 has it; what it computes needs every parameter of its root."""
        if self.size == 1:
            return model
        if not self.shards:
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # The root holds the embeddings and the classifier, whole from the forward pass to the end
        # of the backward pass, which is what the loss head needs.
        fully_shard(model, mesh=mesh)
        return model

    def total(self, metrics: ClassMetrics) -> ClassMetrics:
        """What all processes have seen, on every one of them."""
        if self.size == 1:
            return metrics
        state = metrics.state_dict()
        for tensor in state.values():
            dist.all_reduce(tensor)
        summed = ClassMetrics(metrics.num_classes, metrics.device)
        summed.load_state_dict(state)
        return summed

    def most(self, value: int) -> int:
        """The largest value of any process. Hosts wait for each other here, not devices."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values.item())

    def tell(self, message: Any) -> Any:
        """What the first process gives, in every process. (Pickled; it comes from ourselves.)"""
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def copied(self, state: Any) -> Any:
        """A `snapshot` of a state_dict with whole tensors in place of shards; in the first process.

        The others have None for its tensors. (torch.distributed.checkpoint would write a file for
        each process, and a pickle, which only this number of processes reads without a conversion,
        and no one without trust.)
        """

        def whole(tensor: Any) -> Tensor | None:
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            return tensor if self.leads else None

        return snapshot(state, whole)

    def scattered(self, part: Any, state: Any) -> Any:
        """The state_dict of a model or optimizer from whole tensors, cut as the part is."""
        if not self.shards:
            return state
        from torch.distributed.tensor import DTensor, distribute_tensor

        def like(shard: Any, tensor: Any) -> Any:
            if not isinstance(shard, DTensor) or not isinstance(tensor, Tensor) or not tensor.ndim:
                return tensor
            tensor = tensor.to(shard.device)
            # Every process has read the same file: nothing is sent.
            return distribute_tensor(
                tensor, shard.device_mesh, shard.placements, src_data_rank=None
            )

        if isinstance(part, nn.Module):
            own = part.state_dict()
            return {name: like(own.get(name), tensor) for name, tensor in state.items()}
        if isinstance(part, torch.optim.Optimizer):
            owners = [parameter for group in part.param_groups for parameter in group["params"]]
            moments = {
                number: {name: like(owner, moments[name]) for name in moments}
                for number, owner in enumerate(owners)
                if (moments := state["state"].get(number)) is not None
            }
            return state | {"state": moments}
        return state


ALONE = Group()


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def join(parallel: Parallel, device: str) -> Group:
    """The group that torchrun has started this process in; ALONE without torchrun.

    Raises:
        ValueError: a GPU is asked for and there is none for this process.
    """
    size = processes()
    if size == 1:
        return ALONE
    on_gpu = resolve_device(device).type == "cuda"
    if on_gpu:
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise ValueError(f"process {number} has no GPU; this machine has {there}")
        torch.cuda.set_device(number)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    return Group(rank=dist.get_rank(), size=size, parallel=parallel)


class Follower:
    """What a follower has in place of an Attempt: the first process writes for all."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def folders(self) -> Sequence[Path]:
        """Where checkpoints may lie, the first process's folder first."""
        return self._folders

    @property
    def folder(self) -> Path:
        """The folder of the first process's attempt."""
        return self._folders[0]

    def should_stop(self) -> bool:
        """The first process decides."""
        return False

    def resume(self, *_: Any) -> None:
        """Nothing to write."""

    def append_scalars(self, *_: Any) -> None:
        """Nothing to write."""


class GroupPool:
    """The pool of a sweep under torchrun: one run at a time, by all processes together."""

    width = 1

    def __init__(self) -> None:
        self.in_step = True
        """whether the followers wait for the next run"""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function in a thread of this process, so that progress is shown meanwhile."""
        if not self.in_step:
            raise ValueError("a run failed and left the processes out of step: start them again")
        self.in_step = False
        future: Future[Any] = Future()

        def call() -> None:
            try:
                outcome = function(*arguments)
                self.in_step = outcome.status != "failed"
                future.set_result(outcome)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        return future

    def interrupt(self) -> None:
        """The run is asked to stop through its lease."""

    def close(self) -> None:
        """See `lead`."""


@contextlib.contextmanager
def lead(group: Group) -> Iterator[GroupPool]:
    """The pool to do runs with. The followers are let go in the end, or end with this process."""
    pool = GroupPool()
    try:
        yield pool
    finally:
        if pool.in_step:
            group.tell(None)
            _part()


def follow(group: Group, do: Callable[[Any, Follower], None]) -> None:
    """Do what the first process announces until it has no more.

    The signals that ask to stop are for the first process, which stops all at the same step.

    Raises:
        ValueError: what went wrong in this process alone, which ends the others too.
        SystemExit: the first process, or another, has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        with group_errors():
            while (message := group.tell(None)) is not None:
                order, folders = message
                do(order, Follower(folders))
        _part()
    except GroupBroken:
        raise SystemExit(1) from None
    except Exception as error:
        here = f"process {group.rank} of {group.size}"
        raise ValueError(f"{here}: {error_line(error)}") from error


def _part() -> None:
    """End the group once every process knows that it ends; who closes first is of no matter then.

    Without waiting, the first process could close a connection before its last word is read.
    """
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def group_errors() -> Iterator[None]:
    """Turn what a collective raises when another process has died into GroupBroken."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise GroupBroken("another process of this run has ended") from None
        raise
