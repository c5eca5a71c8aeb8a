"""Scripted turns through the real voice loop, and what each of them cost.

One warm-up round is not counted. The power monitor runs beside; the machine's power mode, clocks
and heat are read before and after.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.identity import Machine, identify
from deeptalk_edge.devices.monitor import Monitor
from deeptalk_edge.devices.probe import state
from deeptalk_edge.devices.report import (
    SCHEMA,
    BundleUsed,
    Device,
    Experts,
    Memory,
    Power,
    Report,
    State,
    Workload,
    distribution,
)
from deeptalk_edge.devices.samples import (
    Sample,
    metrics_of,
    sample_of,
    stages_of,
    write_samples,
)
from deeptalk_edge.devices.scripted_port import ScriptedPort
from deeptalk_edge.errors import AudioError, DeviceLost, SettingsError
from deeptalk_edge.files import sha256_of
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.echo import open_canceller
from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import (
    AudioChunk,
    LiveEvent,
    SoundLost,
    TurnDone,
    TurnFailed,
)
from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import resample

Array = NDArray[np.float32]

_PAUSE_S = 0.6  # between an answer and the next question
_ANSWER_S = 120.0  # the longest wait for an answer after its recording was heard
_SPEAKER_S = 600.0  # and for a person to speak
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is asked, and how often."""

    questions: Sequence[Path] = ()
    """Recordings; none: a person speaks into the microphone."""
    turns: int = 20
    warmup_turns: int = 1
    cut_s: float | None = None
    """Interrupt each answer so long after its first sound was made."""


def profile_bundle(
    place: Path,
    script: Script,
    *,
    choose: Callable[[Bundle], ConversationSettings] = ConversationSettings.of,
    port: SoundPort | None = None,
    samples: Path | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Ask all turns and report. `port` is a live one; without it the recordings are the microphone.

    Raises SettingsError if there is nothing to ask, AudioError for a file without a question or in
    which the loop hears no voice, DeviceLost if the sound devices are lost, and the errors of
    `Bundle.open` and `Conversation`.
    """
    _check(script, port)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    questions = [resample(read_sound(path), RATE_HZ).pcm for path in script.questions]
    machine, before_mb = identify(), host.peak_resident_mb()
    start = state_of(state())
    bundle = Bundle.open(place)
    counts: list[dict[str, Any]] = []
    with Conversation(bundle, choose(bundle)) as talk:
        talk.on_expert_counts = counts.append
        with Monitor() as monitor:
            turns, num_failed = _ask_all(talk, script, questions, port, counts, show)
        end = state_of(state())
        counted = [turn for turn in turns if not turn.is_warmup]
        if samples is not None:
            write_samples(samples, turns)
        return Report(
            schema=SCHEMA,
            started=started,
            source="measured",
            device=_device(machine),
            state_start=start,
            state_end=end,
            bundle=_used(place, talk),
            workload=_workload(script, port),
            metrics=metrics_of(counted),
            stages=stages_of(counted),
            underruns=sum(turn.underruns for turn in counted),
            failed_turns=num_failed,
            experts=_experts(counts),
            memory=_memory(bundle.manifest, before_mb),
            power=_power(monitor, counted),
            samples=str(samples) if samples else None,
            warnings=tuple(_warnings(start, end, counted, monitor)),
        )


def _check(script: Script, port: SoundPort | None) -> None:
    if script.turns < 1 or script.warmup_turns < 0:
        raise SettingsError(
            f"{script.turns} turns and {script.warmup_turns} before: expected 1 or more, 0 or more"
        )
    if port is None and not script.questions:
        raise SettingsError("nothing to ask: name spoken questions with --wav, or talk with --mic")


def _ask_all(
    talk: Conversation,
    script: Script,
    questions: Sequence[Array],
    port: SoundPort | None,
    counts: list[dict[str, Any]],
    show: Callable[[int, int], None],
) -> tuple[list[Sample], int]:
    """Every turn that was answered, and how many failed; `counts` are the experts' of the turns
    that count."""
    scripted = ScriptedPort() if port is None else None
    hearing = Hearing(canceller=open_canceller("none")) if scripted else Hearing()
    asked = itertools.cycle(questions)
    turns: list[Sample] = []
    num_failed, total = 0, script.warmup_turns + script.turns
    sound = scripted or port
    assert sound is not None
    with talk.listen(sound, LoopSettings(forget_ms=20), hearing) as live:
        events = iter(live)
        while len(turns) + num_failed < total:
            time.sleep(_PAUSE_S)
            show(len(turns), total)
            if len(turns) == script.warmup_turns:
                counts.clear()
            start_s = time.monotonic()
            patience_s = _SPEAKER_S
            if scripted:
                question = next(asked)
                scripted.ask(question)
                patience_s = _ANSWER_S + len(question) / RATE_HZ
            done = _one_turn(live, events, script.cut_s, patience_s)
            if done is None:
                num_failed += 1
            else:
                is_warmup = len(turns) < script.warmup_turns
                turns.append(sample_of(len(turns), done, start_s, is_warmup=is_warmup))
    show(total, total)
    return turns, num_failed


def _one_turn(
    live: LiveConversation, events: Iterator[LiveEvent], cut_s: float | None, patience_s: float
) -> TurnDone | None:
    """None if the answer failed.

    Raises DeviceLost if the sound is gone, AudioError if nothing was heard for so long.
    """
    timer: threading.Timer | None = None
    watchdog = threading.Timer(patience_s, live.stop)
    watchdog.start()
    try:
        for event in events:
            if isinstance(event, TurnDone):
                return event
            if isinstance(event, TurnFailed):
                log.warning("a turn failed: %s", event.error)
                return None
            if isinstance(event, SoundLost):
                raise DeviceLost(str(event.error)) from event.error
            if isinstance(event, AudioChunk) and cut_s is not None and timer is None:
                timer = threading.Timer(cut_s, live.interrupt)
                timer.start()
    finally:
        for each in (watchdog, timer):
            if each is not None:
                each.cancel()
                each.join()
    raise AudioError(
        f"no answer within {patience_s:.0f} s: the voice detector found no question; "
        "`deeptalk-edge run --wav` shows what it finds in a recording"
    )


def state_of(readings: dict[str, Any]) -> State:
    """The machine's state out of `probe.state`."""

    def value(*names: str) -> Any:
        found = (readings[name].value for name in names if name in readings)
        return next((one for one in found if one is not None), None)

    clocks, gpu, zones = value("cpu_mhz"), value("gpu_mhz"), value("temperatures_c")
    return State(
        power_mode=value("power_mode"),
        governor=value("governor"),
        cpu_mhz=float(np.mean(clocks)) if clocks else None,
        gpu_mhz=float(value("card_gpu_mhz") or max(gpu.values(), default=0)) or None
        if gpu or value("card_gpu_mhz")
        else None,
        emc_mhz=value("emc_mhz"),
        hottest_c=max(zones.values()) if zones else value("card_temperature_c"),
        throttled=value("card_throttle_reasons", "throttled"),
        missing={name: one.why for name, one in readings.items() if one.value is None},
    )


def _device(machine: Machine) -> Device:
    kind: Any = machine.kind
    return Device(
        profile=machine.profile,
        kind=kind,
        model=machine.model.value,
        processor=machine.processor,
        num_cores=machine.num_cores,
        memory_bytes=machine.memory_bytes.value,
        storage=machine.storage.value,
        gpu=machine.gpu.value,
        l4t=machine.l4t.value,
        key=machine.key,
    )


def _used(place: Path, talk: Conversation) -> BundleUsed:
    setup = talk.setup
    return BundleUsed(
        path=str(place),
        sha256=setup.bundle_sha256,
        backend=setup.backend,
        kernel_path=setup.kernel_path,
        threads=setup.threads,
        mode=setup.mode,
        precision=dict(setup.precision),
    )


def _workload(script: Script, port: SoundPort | None) -> Workload:
    return Workload(
        port="wav" if port is None else "microphone",
        turns=script.turns,
        warmup_turns=script.warmup_turns,
        cut_s=script.cut_s,
        questions=tuple(f"{path.name} {sha256_of(path)}" for path in script.questions),
    )


def _memory(manifest: Manifest, before_mb: float | None) -> Memory:
    from deeptalk_edge.devices.plan.source import memory_parts

    return Memory(
        peak_resident_mb=host.peak_resident_mb(),
        before_mb=before_mb,
        parts_mb={name: size / 1e6 for name, size in memory_parts(manifest).items()},
    )


def _power(monitor: Monitor, turns: Sequence[Sample]) -> Power:
    joules = [monitor.energy_j(turn.start_s, turn.end_s) for turn in turns]
    watts = [sample.watts for sample in monitor.samples()]
    return Power(
        method=monitor.method,
        mean_w=float(np.mean(watts)) if watts else None,
        energy_j_per_turn=distribution(joules) if monitor.method else None,
        hz=monitor.hz,
        overhead_share=monitor.overhead_share,
        hottest_c=monitor.hottest_c,
        why=monitor.why_no_power,
    )


def _warnings(start: State, end: State, turns: Sequence[Sample], monitor: Monitor) -> Iterator[str]:
    if start.power_mode != end.power_mode:
        yield f"the power mode changed: {start.power_mode} to {end.power_mode}"
    if start.throttled is not None and end.throttled != start.throttled:
        yield f"the machine was throttled: {start.throttled} to {end.throttled}"
    if refused := sum(turn.stopped == "not_understood" for turn in turns):
        yield (
            f"{refused} of {len(turns)} turns were not understood: their answer is the bundle's "
            "line, and the figures mix both; `deeptalk-edge run --wav` shows what is understood"
        )
    if len(turns) < 20:
        yield f"{len(turns)} turns: fewer than 20 say little of a tail"
    if start.governor not in (None, "performance"):
        yield f"the governor is {start.governor}: clocks follow the load; set it to performance"
    if (monitor.overhead_share or 0) > 0.01:
        yield f"sampling took {monitor.overhead_share:.1%} of a core"


def _experts(turns: Sequence[dict[str, Any]]) -> Experts:
    """Summed over the counted turns."""
    if not turns or "slots" not in turns[0]:
        return Experts(
            hits=None,
            misses=None,
            hit_share=None,
            loaded_bytes=None,
            stall_ms=None,
            slots=None,
            why="the backend counts nothing, or no turn was answered",
        )
    hits, misses = (sum(turn[name] for turn in turns) for name in ("hits", "misses"))
    return Experts(
        hits=hits,
        misses=misses,
        hit_share=hits / (hits + misses) if hits + misses else None,
        loaded_bytes=sum(sum(turn["moved_bytes"].values()) for turn in turns),
        stall_ms=float(sum(sum(turn["stall_ms"].values()) for turn in turns)),
        slots=turns[-1]["slots"],
        why=None if hits + misses else "every expert was in memory: none was requested",
    )
