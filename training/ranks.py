"""Processes that train one model together: each works on its share of a step's batches, then the
gradients are added up, so all of them take the same step.

Processes, because two threads of one hardly gain anything on the tiny decoder: they wait for each
other wherever memory is mapped and Python is run (docs/measurements.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

Batch = TypeVar("Batch")


@contextmanager
def joined(rank: int, count: int, meeting: Path) -> Iterator[None]:
    """Be number `rank` of `count` processes of this machine, which meet at a file that is new. One
    alone joins nobody, so it may train on a GPU.

    Raises RuntimeError if the others do not come.
    """
    if count == 1:
        yield
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=meeting.absolute().as_uri(), rank=rank, world_size=count
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that shows and saves; alone, it is."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(batches: Sequence[Batch]) -> Sequence[Batch]:
    """What this process works on: of one batch the first process all, the others nothing."""
    if not dist.is_initialized():
        return batches
    return batches[dist.get_rank() :: dist.get_world_size()]


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
