"""Replays routes through the pager's own decisions, without a byte moved.

replay     what would be hit, missed and read: the same figures as the pager's, exactly, if every
           hint had time to arrive
simulate   the same on a clock: one link, layer after layer; simulated, never measured

    layer = attention -> routing known -> its experts must be there -> they compute -> next layer

The link is one queue: a demand goes in front of every hint and breaks off the one on its way at a
chunk's end; a hint that has not begun when its layer passes is cancelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from deeptalk_edge.runtime.experts.policy import Phase, Policy
from deeptalk_edge.runtime.experts.residency import Cause, Load, Residency, waves_of
from deeptalk_edge.runtime.experts.routes import Call, Pass, Routes

PolicyMaker = Callable[[int, int], Policy]
"""Of (num_keys, num_experts)."""

_SHARED_SHARE = 0.25  # of a layer's expert time: the shared experts, which never wait
_SPEECH_TO_SWEEP_MS = 200.0
_FIRST_FRAME_STEPS = 8  # the delay pattern of the codebooks
_FRAME_MS = 20.0  # of speech per heard row
_ATTENTION_SHARE = 0.4  # of a prefilled row's time
_CHUNKS = 4  # of a transfer: where a demand may break it off


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """The pager's, as far as they decide anything."""

    num_slots: int
    look_ahead: bool = True
    sweep_share: float = 0.7
    wave_experts: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevice:
    """What a timed replay needs to know; estimates, see docs/paging.md."""

    pool_bytes: int
    record_bytes: int
    link_gbps: float
    """GB/s to the experts."""
    attention_ms: float
    """Per layer and decode step."""
    experts_ms: float
    """Per layer and decode step, all of them resident."""
    fixed_ms: float
    """Per step: dense layer, heads, sampling."""
    prefill_row_ms: float
    """Per row and layer."""
    prefill_expert_ms: float
    """Per expert of a layer's union."""
    latency_ms: float = 0.05
    """Per transfer."""
    is_disk: bool = True
    """Else the experts lie in host memory, and the page cache has no part in it."""
    hangover_ms: float = 400.0
    gap_ms: float = 800.0
    """Between an answer and the next question."""

    @property
    def transfer_ms(self) -> float:
        return self.record_bytes / self.link_gbps / 1e6 + self.latency_ms


@dataclass(slots=True)
class Timing:
    """When things happened; simulated."""

    step_ms: list[float] = field(default_factory=list)
    stall_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    first_audio_ms: list[float] = field(default_factory=list)
    """From the end of speech, including the hangover, to the first complete codec frame."""
    link_busy_ms: float = 0.0
    total_ms: float = 0.0


def replay(routes: Routes, make_policy: PolicyMaker, settings: ReplaySettings) -> Residency:
    """Run every decision over the routes; counts are on what it returns."""
    residency = _residency(routes, make_policy, settings)
    link = _Ideal(residency)
    for each in routes.passes:
        _enter(residency, each, settings, link)
        for call in each.calls:
            _route(routes, residency, call, settings, link)
    return residency


def simulate(
    routes: Routes, make_policy: PolicyMaker, settings: ReplaySettings, device: SimulatedDevice
) -> tuple[Residency, Timing]:
    """The same on a clock."""
    residency = _residency(routes, make_policy, settings)
    clock = _Clock(residency, device)
    timing = Timing()
    heard_ms, num_steps = 0.0, 0
    for number, each in enumerate(routes.passes):
        if each.phase is Phase.LISTENING:
            clock.now_ms += device.gap_ms + _SPEECH_TO_SWEEP_MS
            _enter(residency, each, settings, clock)
            clock.now_ms += max(_speech_ms(routes.passes[number:]) - _SPEECH_TO_SWEEP_MS, 0.0)
            heard_ms, num_steps = clock.now_ms, 0
            clock.now_ms += device.hangover_ms
            continue
        _enter(residency, each, settings, clock)
        start_ms, clock.stall_ms = clock.now_ms, 0.0
        for call in each.calls:
            clock.attend(each.phase, call)
            _route(routes, residency, call, settings, clock)
        if each.phase is Phase.THINKING:
            timing.prefill_ms.append(clock.now_ms - start_ms)
            continue
        clock.now_ms += device.fixed_ms
        timing.step_ms.append(clock.now_ms - start_ms)
        timing.stall_ms.append(clock.stall_ms)
        num_steps += 1
        if num_steps == _FIRST_FRAME_STEPS:
            timing.first_audio_ms.append(clock.now_ms - heard_ms)
    timing.link_busy_ms, timing.total_ms = clock.busy_ms, clock.now_ms
    return residency, timing


class _Link(Protocol):
    """Brings what the decisions ask for."""

    def cancel_guesses(self, keys: range, wanted: set[int]) -> None:
        """What was guessed among `keys` and is not wanted need not come."""

    def make_room(self) -> None:
        """A demand finds no slot that it may take: guesses have to give way."""

    def bring(self, loads: list[Load], keys: Sequence[int]) -> float:
        """Begin to bring demanded experts; returns when they will be there."""

    def wait(self, there_ms: float) -> None:
        """Until then."""

    def compute(self, call: Call, num_experts: int) -> None:
        """So many of a layer's experts compute."""

    def guess(self, loads: list[Load]) -> None:
        """Bring these when there is nothing better to do."""


class _Ideal:
    """Brings everything at once."""

    def __init__(self, residency: Residency) -> None:
        self._table = residency.table

    def cancel_guesses(self, keys: range, wanted: set[int]) -> None:
        pass

    def make_room(self) -> None:
        raise AssertionError("nothing is ever on its way")

    def bring(self, loads: list[Load], keys: Sequence[int]) -> float:
        self.guess(loads)
        return 0.0

    def wait(self, there_ms: float) -> None:
        pass

    def compute(self, call: Call, num_experts: int) -> None:
        pass

    def guess(self, loads: list[Load]) -> None:
        for load in loads:
            self._table.fill(load.slot)


@dataclass(frozen=True, slots=True)
class _Guess:
    """A hint in the link's queue."""

    load: Load
    since_ms: float
    left_ms: float
    """Of its transfer."""


class _Clock:
    """One link and one timeline, in milliseconds."""

    def __init__(self, residency: Residency, device: SimulatedDevice) -> None:
        self._residency, self._device = residency, device
        self.now_ms = self.stall_ms = self.busy_ms = 0.0
        self._free_ms = 0.0  # when the link has done what it has begun
        self._guesses: deque[_Guess] = deque()
        self._under_way: Load | None = None  # a hint that is there at `_free_ms`
        self._hidden_ms = 0.0  # of a wait: the shared experts compute meanwhile
        self._is_decoding = False

    def attend(self, phase: Phase, call: Call) -> None:
        """The attention of a layer; the link brings hints meanwhile."""
        device = self._device
        self._is_decoding = phase is Phase.SPEAKING
        if self._is_decoding:
            self.now_ms += device.attention_ms
            self._hidden_ms = _SHARED_SHARE * device.experts_ms
        else:
            self.now_ms += _ATTENTION_SHARE * device.prefill_row_ms * len(call.ids)
            self._hidden_ms = 0.0
        self._idle_until(self.now_ms)

    def cancel_guesses(self, keys: range, wanted: set[int]) -> None:
        for guess in list(self._guesses):
            is_whole = guess.left_ms == self._device.transfer_ms
            if guess.load.key in keys and guess.load.key not in wanted and is_whole:
                self._guesses.remove(guess)
                self._residency.cancel(guess.load)

    def make_room(self) -> None:
        if self._guesses:
            self.cancel_guesses(range(len(self._residency.expected)), set())
            while self._guesses:  # what had begun must be brought to its end
                self._begin(self._guesses[0])
                self._residency.table.fill(self._guesses.popleft().load.slot)
        if self._under_way is not None:
            self._residency.table.fill(self._under_way.slot)
            self._under_way = None
        self.wait(self._free_ms)

    def bring(self, loads: list[Load], keys: Sequence[int]) -> float:
        table, transfer_ms = self._residency.table, self._device.transfer_ms
        self._idle_until(self.now_ms)
        there_ms = self.now_ms
        if self._under_way is not None and self._under_way.key in keys:
            table.fill(self._under_way.slot)
            self._under_way, there_ms = None, self._free_ms
        urgent = [_Guess(load, self.now_ms, transfer_ms) for load in loads]
        urgent += [guess for guess in self._guesses if guess.load.key in keys]
        if not urgent:
            return there_ms
        if self._under_way is not None:
            self._break_off(self._under_way)
        for guess in urgent:
            if guess in self._guesses:
                self._guesses.remove(guess)
            self._begin(guess)
            table.fill(guess.load.slot)
        return self._free_ms

    def wait(self, there_ms: float) -> None:
        stall_ms = max(there_ms - self.now_ms - self._hidden_ms, 0.0)
        self.stall_ms += stall_ms
        self.now_ms += stall_ms

    def compute(self, call: Call, num_experts: int) -> None:
        device, share = self._device, num_experts / len(call.experts)
        if self._is_decoding:
            self.now_ms += device.experts_ms * share
        else:
            rows_ms = (1 - _ATTENTION_SHARE) * device.prefill_row_ms * len(call.ids) * share
            self.now_ms += max(rows_ms, device.prefill_expert_ms * num_experts)

    def guess(self, loads: list[Load]) -> None:
        transfer_ms = self._device.transfer_ms
        self._guesses.extend(_Guess(load, self.now_ms, transfer_ms) for load in loads)

    def _idle_until(self, until_ms: float) -> None:
        """Bring hints that can begin before `until_ms`."""
        while True:
            if self._under_way is not None:
                if self._free_ms > until_ms:
                    return
                self._residency.table.fill(self._under_way.slot)
                self._under_way = None
            if not self._guesses:
                return
            guess = self._guesses[0]
            if max(self._free_ms, guess.since_ms) >= until_ms:
                return
            self._guesses.popleft()
            self._free_ms = max(self._free_ms, guess.since_ms) + guess.left_ms
            self.busy_ms += guess.left_ms
            self._under_way = guess.load

    def _begin(self, guess: _Guess) -> None:
        self._free_ms = max(self._free_ms, self.now_ms) + guess.left_ms
        self.busy_ms += guess.left_ms

    def _break_off(self, load: Load) -> None:
        """Leave the hint under way for a demand at a chunk's end; the rest of it comes later."""
        chunk_ms = self._device.transfer_ms / _CHUNKS
        left_ms = (self._free_ms - self.now_ms) // chunk_ms * chunk_ms
        self._free_ms -= left_ms
        self.busy_ms -= left_ms
        self._under_way = None
        if left_ms:
            self._guesses.appendleft(_Guess(load, self.now_ms, left_ms))
        else:
            self._residency.table.fill(load.slot)


def _residency(routes: Routes, make_policy: PolicyMaker, settings: ReplaySettings) -> Residency:
    return Residency(
        num_layers=len(routes.layers),
        num_experts=routes.num_experts,
        num_slots=settings.num_slots,
        policy=make_policy(len(routes.layers) * routes.num_experts, routes.num_experts),
    )


def _enter(residency: Residency, each: Pass, settings: ReplaySettings, link: _Link) -> None:
    is_new = each.phase is not residency.phase
    residency.begin(each.phase)
    if is_new and each.phase is Phase.LISTENING:
        for key in residency.plan_sweep(int(settings.num_slots * settings.sweep_share)):
            link.guess(residency.hint([key], Cause.SWEEP))


def _route(
    routes: Routes, residency: Residency, call: Call, settings: ReplaySettings, link: _Link
) -> None:
    """One layer: its waves in the pager's order, and the hints after the last one."""
    base = routes.layers.index(call.layer) * routes.num_experts
    keys = [base + expert for expert in call.experts]
    link.cancel_guesses(range(base, base + routes.num_experts), set(keys))
    waves = waves_of(keys, limit=settings.wave_experts, num_slots=settings.num_slots)

    def demand(number: int) -> float:
        later = [key for wave in waves[number + 1 :] for key in wave]
        loads = residency.demand(waves[number], later)
        if loads is None:
            link.make_room()
            loads = residency.demand(waves[number], later)
        assert loads is not None  # nothing else leases here
        return link.bring(loads, waves[number])

    there_ms = demand(0)
    for number, wave in enumerate(waves):
        link.wait(there_ms)
        if number + 1 < len(waves):
            there_ms = demand(number + 1)
        elif settings.look_ahead and len(call.predicted):
            hinted = [base + routes.num_experts + expert for expert in call.hinted]
            link.guess(residency.hint(hinted))
        link.compute(call, len(wave))
        slots = [residency.table.slot_of[key] for key in wave]
        residency.table.release(slots, [residency.table.generations[slot] for slot in slots])


def _speech_ms(passes: Sequence[Pass]) -> float:
    """How long the question is that begins `passes`, by its heard rows."""
    turn = takewhile(lambda each: each.phase is not Phase.SPEAKING, passes)
    return sum(each.num_heard for each in turn) * _FRAME_MS
