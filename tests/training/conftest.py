"""One thread for torch: these models are too small for two, which only wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
