"""Threads of the tests that run torch beside the runtime."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Two threads on a busy machine wait for each other."""
    torch.set_num_threads(1)
