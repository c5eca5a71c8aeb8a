"""Fits a word head on a checkpoint's frozen features, from transcribed recordings.

Connectionist temporal classification (Graves et al. 2006) through a layer norm and one matrix;
AdamW with one cycle. The whole set is a few megabytes, so minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.word_head import WordHead

Array = NDArray[np.float32]

_BATCH = 32
_NOISE = 0.05
"""Of the features' own deviation, added anew in each pass: else a small set is learnt by heart."""


def fit_word_head(
    features: Sequence[Array],
    texts: Sequence[str],
    *,
    words: Sequence[str] = (),
    epochs: int = 20,
    seed: int = 0,
) -> WordHead:
    """A head over the features (n, C) of each recording and its words.

    `words` are more that the head shall know, such as those of all questions. Raises SettingsError
    if a recording has no words or more words than frames.
    """
    known = sorted({word for text in texts for word in text.split()} | set(words))
    labels = {word: label for label, word in enumerate(known, start=1)}
    said = [[labels[word] for word in text.split()] for text in texts]
    for i, (frames, ids) in enumerate(zip(features, said, strict=True)):
        if not 0 < 2 * len(ids) < len(frames):
            raise SettingsError(
                f"recording {i}: {len(ids)} words in {len(frames)} frames of 20 ms; expected at "
                "least one word and two frames each"
            )
    width = features[0].shape[1]
    torch.manual_seed(seed)
    norm, linear = nn.LayerNorm(width), nn.Linear(width, len(known) + 1)
    head = nn.Sequential(norm, linear)
    num_batches = max(len(features) // _BATCH, 1)
    optimiser = torch.optim.AdamW(head.parameters(), 5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1e-2, total_steps=epochs * num_batches
    )
    scale = float(np.std(features[0])) * _NOISE
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for part in np.array_split(order.permutation(len(features)), num_batches):
            loss = _loss(head, [features[i] for i in part], [said[i] for i in part], scale)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    arrays = (norm.weight, norm.bias, linear.weight, linear.bias)
    return WordHead(tuple(known), *(_array(tensor) for tensor in arrays))


def _loss(
    head: nn.Module, features: Sequence[Array], said: Sequence[Sequence[int]], noise: float
) -> torch.Tensor:
    lengths = torch.tensor([len(frames) for frames in features])
    x = nn.utils.rnn.pad_sequence([torch.from_numpy(frames) for frames in features], True)
    x = x + noise * torch.randn_like(x)
    log_p = head(x).log_softmax(-1).transpose(0, 1)
    ids = torch.tensor([label for line in said for label in line])
    counts = torch.tensor([len(line) for line in said])
    return F.ctc_loss(log_p, ids, lengths, counts, zero_infinity=True)


def _array(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
