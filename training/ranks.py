"""Processes that train one model together: each works on its share of a step's batches, then the
gradients are added up, so all of them take the same step.

replicas   every process has the whole model (`make tiny`): two threads of one process hardly gain
           anything on the tiny decoder, they wait for each other wherever memory is mapped and
           Python is run (docs/measurements/tiny_training.md)
shards     every process has a part of each tensor, by FSDP2; gradients are summed, not averaged
life       a thread of each process shows in the store that they share that it lives, so that those
           who wait for one that died can say which
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore, Store, rendezvous  # type: ignore[attr-defined]

from deeptalk_edge.errors import TrainingFailed

P = TypeVar("P")

_BEAT_S = 0.5
_DEAD_AFTER_S = 3.0


@contextmanager
def joined(rank: int, count: int, meeting: Path) -> Iterator[None]:
    """Be number `rank` of `count` processes of this machine, which meet at a file that is new. One
    alone joins no group, so it may train on a GPU.

    Raises RuntimeError if the others do not come, TrainingFailed if one of them dies.
    """
    if count == 1:
        yield
        return
    store = FileStore(str(meeting.absolute()), count)
    with _group(store, rank, count, "gloo"):
        yield


@contextmanager
def joined_by_torchrun() -> Iterator[None]:
    """Join the processes that `torchrun` started; without it, none.

    Raises TrainingFailed, naming it, if one of them dies.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(rendezvous("env://", rank, count))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _group(store, rank, count, backend):
        yield


@contextmanager
def _group(store: Store, rank: int, count: int, backend: str) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        with _Heartbeat(store, rank, count) as heartbeat:
            try:
                yield
            except RuntimeError as error:  # a collective that a process did not reach
                dead = heartbeat.dead()
                if not dead:
                    raise
                raise TrainingFailed(
                    f"process {', '.join(map(str, dead))} of {count} has died, so process {rank} "
                    "stops; its own error says why. Start the run again with --resume"
                ) from error
    finally:
        dist.destroy_process_group()


class _Heartbeat:
    """Shows that this process lives, and sees which others no longer do."""

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._store.set(f"alive/{self._rank}", "0")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def dead(self) -> list[int]:
        """Processes whose heart does not beat for three seconds."""
        before = self._beats()
        time.sleep(_DEAD_AFTER_S)
        return [
            rank
            for rank, (old, new) in enumerate(zip(before, self._beats(), strict=True))
            if old == new and rank != self._rank
        ]

    def _beats(self) -> list[bytes]:
        self._store.set_timeout(timedelta(seconds=_DEAD_AFTER_S))
        try:
            return [self._store.get(f"alive/{rank}") for rank in range(self._count)]
        except RuntimeError:  # the store itself went with process 0
            return [b""] + [os.urandom(4) for _ in range(self._count - 1)]

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(_BEAT_S):
            count += 1
            try:
                self._store.set(f"alive/{self._rank}", str(count))
            except RuntimeError:
                return  # no reader is left


def is_first() -> bool:
    """Whether this process is the one that shows and saves; alone, it is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process is here."""
    if dist.is_initialized():
        dist.barrier()


def num_ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(plans: Sequence[P], rank: int, count: int) -> Sequence[P]:
    """What process `rank` of `count` works on: of one batch the first process all, the others
    nothing."""
    return plans[rank::count]


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make every process's gradients the sum of all; those that are missing count as zeros."""
    if not dist.is_initialized():
        return
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def add_up_losses(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """The sums over all processes, by name; every process calls it."""
    mine = {name: float(loss) for name, loss in losses.items()}
    if not dist.is_initialized():
        return mine
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    names = dict.fromkeys(name for losses in everyone for name in losses)
    return {name: sum(losses.get(name, 0.0) for losses in everyone) for name in names}


def shard(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Split a model over the joined processes, each of `layers` apart (FSDP2); gradients become
    sums over the processes. Alone, nothing is done."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has split it."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())
