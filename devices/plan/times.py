"""How long a device takes, from what the work moves and computes: a roofline and what to expect.

floor      bytes over the memory's full rate, or operations over the peak, whichever takes longer
expected   what engines usually reach of it, `Assumptions`; every figure is computed, none measured

    voice to voice = hangover + encoder + prefill + paging + steps to the first frame + buffer
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from deeptalk_edge.devices.plan.work import CodecWork, ModelWork

FRAME_MS = 2048 / 24
"""Of sound; a step must not take longer."""

_ENCODER_ROWS_PER_S = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device does in a second."""

    memory_gb_per_s: float
    product_tops: float
    """Of dense products, in the precision of the activations."""
    link_gb_per_s: float | None = None
    """To the experts that are not in memory; None: it cannot page."""
    encoder_tops: float | None = None
    """Of the encoder's and the codec's; None: as `product_tops`."""
    activations_g_per_s: float | None = None
    """10^9 of the codec's activations in a second; None: products take longer, as on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What is not known before anything runs, each with its reason."""

    step_efficiency: float = 0.5
    """Of the memory's rate. Published for MoE at int4: 51 % (Thor, TensorRT Edge-LLM), 38 % (Thor,
    vLLM), 26 % (AGX Orin), 33 % (RTX 5090)."""
    product_efficiency: float = 0.4
    """Of the peak, for encoder and prefill."""
    prefill_memory_efficiency: float = 0.5
    reads_hide: bool = True
    """Whether weights are read while products of many rows run. A core of a CPU reads weights, then
    multiplies: there the two add up."""
    hangover_ms: float = 300.0
    buffer_ms: float = 40.0
    """Of sound that is ahead of the loudspeaker."""
    first_frame_steps: int = 7
    """The delay pattern of the codebooks: steps to the first whole frame."""
    codec_steps: int = 1
    """One more: the codec hears a frame ahead."""
    prompt_rows: int = 29
    """Of a question beside its speech: roles, separators and the system prompt's end."""
    guesses: bool = True
    """The pager looks ahead and sweeps while the user speaks."""


FLOOR = Assumptions(
    step_efficiency=1.0,
    product_efficiency=0.8,
    prefill_memory_efficiency=1.0,
    hangover_ms=200.0,
    buffer_ms=20.0,
    codec_steps=0,
)
"""The best that a perfect engine could do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds, computed."""

    step_ms: Mapping[int, float]
    """By items, 1 and 2; the experts that are not in memory included."""
    stall_ms: Mapping[int, float]
    """Of that, the wait for them."""
    limit: Mapping[int, str]
    """What a step takes longest for: memory, products or paging."""
    encoder_ms: float
    prefill_ms: float
    paging_ms: float
    """Before the first step: the missing experts, once through, while the question is prefilled."""
    codec_ms: float
    """Of a frame."""
    first_sound_ms: float
    """From the end of the utterance as it is noticed."""
    voice_to_voice_ms: float
    """From the true end of speech."""

    @property
    def limited_by(self) -> str:
        """The largest part of the wait for the first sound."""
        parts = {
            "paging": self.paging_ms,
            "encoder": self.encoder_ms,
            "prefill": self.prefill_ms,
            "hangover": self.voice_to_voice_ms - self.first_sound_ms,
        }
        parts["steps"] = self.first_sound_ms - sum(
            value for name, value in parts.items() if name != "hangover"
        )
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked and how."""

    seconds: float = 5.0
    context_rows: int = 1024
    """Rows that are cached when the answer begins."""
    num_items: int = 2
    """Batch-parallel answers decode two."""
    encoder_frames: int | None = None
    """Of the encoder's window; None: the whole window that it was trained with."""


def times(
    work: ModelWork,
    rates: Rates,
    question: Question,
    resident_share: float,
    assumptions: Assumptions,
) -> Times:
    """What to expect of a device that keeps `resident_share` of the experts in memory."""
    steps = {items: _step(work, rates, question, items, assumptions) for items in (1, 2)}
    hits = hit_share(resident_share, guesses=assumptions.guesses)
    stalls = {items: _stall_ms(work, rates, items, hits) for items in (1, 2)}
    step_ms = {items: steps[items] + stalls[items] for items in (1, 2)}
    rows = round(question.seconds * _ENCODER_ROWS_PER_S) + assumptions.prompt_rows
    encoder_ms = _encoder_ms(work, rates, question, assumptions)
    prefill_ms = _rows_ms(
        work.prefill_operations(rows),
        work.prefill_bytes(rows),
        rates.product_tops,
        rates,
        assumptions,
    )
    missing_bytes = (1 - resident_share) * work.all_expert_bytes
    paging_ms = missing_bytes / (rates.link_gb_per_s * 1e6) if rates.link_gb_per_s else 0.0
    num_steps = assumptions.first_frame_steps + assumptions.codec_steps
    first_sound_ms = encoder_ms + prefill_ms + paging_ms + num_steps * step_ms[question.num_items]
    first_sound_ms += assumptions.buffer_ms
    return Times(
        step_ms=step_ms,
        stall_ms=stalls,
        limit={items: _limit(work, rates, question, items, stalls[items]) for items in (1, 2)},
        encoder_ms=encoder_ms,
        prefill_ms=prefill_ms,
        paging_ms=paging_ms,
        codec_ms=_codec_ms(work.codec, rates, assumptions),
        first_sound_ms=first_sound_ms,
        voice_to_voice_ms=assumptions.hangover_ms + first_sound_ms,
    )


_HITS = (
    # Share of experts in memory, hits on demand alone, hits with look-ahead and sweep.
    (0.0, 0.0, 0.0),
    (0.10, 0.329, 0.800),
    (0.25, 0.604, 0.875),
    (0.42, 0.757, 0.925),
    (0.65, 0.875, 0.962),
    (0.85, 0.947, 0.982),
    (1.0, 1.0, 1.0),
)
"""Simulated: `routes replay synthetic:mid --pool 10% 25% 42% 65% 85% --policy phased`."""


def hit_share(resident_share: float, *, guesses: bool) -> float:
    """How often a needed expert is in memory, between simulated points."""
    column = 2 if guesses else 1
    for low, high in itertools.pairwise(_HITS):
        if resident_share <= high[0]:
            way = (resident_share - low[0]) / (high[0] - low[0])
            return low[column] + way * (high[column] - low[column])
    return 1.0


def _step(
    work: ModelWork, rates: Rates, question: Question, items: int, assumptions: Assumptions
) -> float:
    num_bytes = work.step_bytes(items, question.context_rows)
    memory_ms = num_bytes / (rates.memory_gb_per_s * 1e6 * assumptions.step_efficiency)
    products_ms = _ms(work.step_operations(items), rates.product_tops)
    return max(memory_ms, products_ms)


def _stall_ms(work: ModelWork, rates: Rates, items: int, hits: float) -> float:
    if rates.link_gb_per_s is None:
        return 0.0
    misses = (1 - hits) * work.num_moe_layers * work.experts_of(items)
    return misses * work.expert_bytes / (rates.link_gb_per_s * 1e6)


def _limit(work: ModelWork, rates: Rates, question: Question, items: int, stall_ms: float) -> str:
    parts = {
        "memory": work.step_bytes(items, question.context_rows) / (rates.memory_gb_per_s * 1e6),
        "products": _ms(work.step_operations(items), rates.product_tops),
        "paging": stall_ms,
    }
    return max(parts, key=lambda name: parts[name])


def _encoder_ms(
    work: ModelWork, rates: Rates, question: Question, assumptions: Assumptions
) -> float:
    frames = question.encoder_frames or work.encoder.max_frames
    tops = rates.encoder_tops or rates.product_tops
    operations = work.encoder_operations(frames)
    return _rows_ms(operations, work.encoder_bytes, tops, rates, assumptions)


def _codec_ms(codec: CodecWork, rates: Rates, assumptions: Assumptions) -> float:
    tops = rates.encoder_tops or rates.product_tops
    layers_ms = _rows_ms(codec.operations, codec.weight_bytes, tops, rates, assumptions)
    if rates.activations_g_per_s is None:
        return layers_ms
    return layers_ms + codec.activations / (rates.activations_g_per_s * 1e6)


def _rows_ms(
    operations: float, num_bytes: float, tops: float, rates: Rates, assumptions: Assumptions
) -> float:
    """Of many rows through weights that are read once."""
    products_ms = _ms(operations, tops * assumptions.product_efficiency)
    gb_per_s = rates.memory_gb_per_s * assumptions.prefill_memory_efficiency
    reads_ms = num_bytes / (gb_per_s * 1e6)
    return max(products_ms, reads_ms) if assumptions.reads_hide else products_ms + reads_ms


def _ms(operations: float, tops: float) -> float:
    return operations / (tops * 1e9)
