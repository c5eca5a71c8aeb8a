"""Batches of a recipe's data: checked once, then drawn for each step from (seed, step) alone.

index    every sample is read once, without its sound: what is bad is counted and never trained on,
         what is good gives its length
epoch    an order drawn from (seed, epoch); samples of like length share a batch
step     `accumulation` batches; the position in the data is the step's number
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.files import sha256_of
from deeptalk_edge.model.prompt import AUDIO_TOKEN, Template
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.data.codes import CodeCache
from deeptalk_edge.training.data.conversations import BadSample, Clip, SampleFile
from deeptalk_edge.training.data.samples import Sample, SampleWriter, heard_log_mel
from deeptalk_edge.training.items import Batch, corrupt_codes, pad_items
from deeptalk_edge.training.stages.objective import PreferenceBatch
from deeptalk_edge.training.stages.recipe import Source

T = TypeVar("T")

POOL_BATCHES = 32
"""Batches' worth of samples that are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one sample."""

    where: str
    """File and line."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One good sample: where it is, and how many rows it has."""

    source: int
    line: int
    offset: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the samples of some sources, for one checkpoint. Travels to data workers."""

    checkpoint: Path
    spec: ModelSpec
    sources: tuple[Source, ...]
    system: str
    max_rows: int
    is_preference: bool = False
    cache: Path = field(default=Path("build/codes"))
    corrupted_codes: float = 0.0
    """As `recipe.Data.corrupted_codes`; evaluation feeds what is true."""
    remembered: Mapping[tuple[Clip, ...], int] | None = None
    """Where in the table of remembered features a turn's recordings begin; else log-mels travel
    with each batch."""

    @cached_property
    def files(self) -> list[SampleFile]:
        return [SampleFile(Path(source.path)) for source in self.sources]

    @cached_property
    def writers(self) -> list[SampleWriter]:
        template = open_template(self.checkpoint, self.spec)
        codes = CodeCache(self.checkpoint, self.cache)
        return [
            SampleWriter(self.spec, template, system=source.system or self.system, cache=codes)
            for source in self.sources
        ]

    def samples(
        self, source: int, line: int, offset: int, draw: random.Random | None
    ) -> tuple[Sample, ...]:
        """One sample, or a pair. Raises BadSample, saying what is wrong."""
        file, writer, task = self.files[source], self.writers[source], self.sources[source].task
        read: tuple[Sample, ...]
        if self.is_preference:
            read = writer.pair(file.preferred(line, offset), task)
        else:
            read = (writer.sample(file.conversation(line, offset), task, draw),)
        longest = max(len(sample.item.rows) for sample in read)
        if longest > self.max_rows:
            raise BadSample(f"{longest} rows, max_rows is {self.max_rows}")
        return read

    def name(self, source: int, line: int) -> str:
        return f"{self.sources[source].path}:{line}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _CACHED}


_CACHED = ("files", "writers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What the sources hold."""

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    digest: str
    """Of the files and of every sample's length: resuming needs the same."""


def build_index(reader: Reader, *, is_deep: bool = False) -> Index:
    """Read every sample once. `is_deep` reads the sounds too.

    Raises ArtifactError if a file cannot be read at all.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    digest = hashlib.sha256()
    for number, file in enumerate(reader.files):
        if file.path.is_file():
            digest.update(sha256_of(file.path).encode())
        for line, offset in file.places():
            try:
                read = reader.samples(number, line, offset, random.Random(0))
                if is_deep:
                    for clips in (clips for sample in read for clips in sample.heard):
                        heard_log_mel(clips, reader.spec)
            except BadSample as error:
                problems.append(Problem(reader.name(number, line), str(error)))
                continue
            rows = max(len(sample.item.rows) for sample in read)
            entries.append(Entry(number, line, offset, rows))
            digest.update(f"{number}:{line}:{rows};".encode())
    return Index(entries=tuple(entries), problems=tuple(problems), digest=digest.hexdigest()[:16])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """One batch to load."""

    entries: tuple[Entry, ...]
    seed: int | None
    """Of what its samples draw; None is the evaluation's choice."""


class Batches:
    """The batches of an index, by step. Travels to data workers. Not thread-safe."""

    def __init__(
        self,
        reader: Reader,
        entries: Sequence[Entry],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
    ) -> None:
        if not entries:
            raise SettingsError(
                "no sample is left to train on; `deeptalk-edge train check` says why"
            )
        self._reader, self._seed = reader, seed
        self._batch_size, self._accumulation = batch_size, accumulation
        self._entries = [
            entry for entry in entries for _ in range(reader.sources[entry.source].repeat)
        ]
        self._epoch: tuple[int, list[list[Entry]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> float:
        return self._num_batches / self._accumulation

    def plans_at(self, step: int) -> list[BatchPlan]:
        """The batches of a step."""
        first = step * self._accumulation
        return [self._plan(number) for number in range(first, first + self._accumulation)]

    def load(self, plan: BatchPlan) -> Batch | PreferenceBatch:
        """Read a batch's samples and their sounds. Raises ArtifactError as `load_batch` does."""
        return load_batch(self._reader, plan)

    def _plan(self, number: int) -> BatchPlan:
        epoch, place = divmod(number, self._num_batches)
        return BatchPlan(
            entries=tuple(self._order(epoch)[place]),
            seed=(self._seed * 1_000_003 + number) % (1 << 62),
        )

    @property
    def _num_batches(self) -> int:
        size, pool = self._batch_size, self._batch_size * POOL_BATCHES
        whole, rest = divmod(len(self._entries), pool)
        return whole * POOL_BATCHES + -(-rest // size)

    def _order(self, epoch: int) -> list[list[Entry]]:
        """The batches of an epoch: samples shuffled, sorted by length within a pool, batches
        shuffled."""
        if self._epoch[0] != epoch:
            draw = random.Random(f"{self._seed}|{epoch}")
            entries = list(self._entries)
            draw.shuffle(entries)
            size, pool = self._batch_size, self._batch_size * POOL_BATCHES
            batches = []
            for start in range(0, len(entries), pool):
                near = sorted(entries[start : start + pool], key=lambda entry: entry.num_rows)
                batches += [near[i : i + size] for i in range(0, len(near), size)]
            draw.shuffle(batches)
            self._epoch = (epoch, batches)
        return self._epoch[1]


def load_batch(reader: Reader, plan: BatchPlan) -> Batch | PreferenceBatch:
    """Read a plan's samples and their sounds. Raises ArtifactError, naming the sample, if one
    cannot be read."""
    groups, names = [], []
    for i, entry in enumerate(plan.entries):
        name = reader.name(entry.source, entry.line)
        draw = None if plan.seed is None else random.Random(f"{plan.seed}|{i}")
        try:
            groups.append(reader.samples(entry.source, entry.line, entry.offset, draw))
        except BadSample as error:
            raise ArtifactError(f"{name}: {error}; it has changed since it was checked") from error
        names.append(name)
    made = [
        _padded(reader, list(samples), names, plan.seed) for samples in zip(*groups, strict=True)
    ]
    return PreferenceBatch(win=made[0], lose=made[1]) if reader.is_preference else made[0]


def _padded(
    reader: Reader, samples: Sequence[Sample], names: Sequence[str], seed: int | None
) -> Batch:
    padded = pad_items([sample.item for sample in samples], reader.spec)
    if seed is not None and reader.corrupted_codes:
        rng = np.random.default_rng(seed)
        corrupt_codes(padded.rows, reader.spec.vocabulary, reader.corrupted_codes, rng)
    window = reader.spec.encoder.max_frames
    mels: list[NDArray[np.float32]] = []
    for i, sample in enumerate(samples):
        turns, frames = padded.frames[i] // window, padded.frames[i] % window
        for turn, clips in enumerate(sample.heard):
            here = turns == turn
            if reader.remembered is not None:
                padded.frames[i][here] = frames[here] + reader.remembered[clips]
                continue
            padded.frames[i][here] = frames[here] + len(mels) * window
            try:
                mels.append(heard_log_mel(clips, reader.spec))
            except BadSample as error:
                raise ArtifactError(f"{names[i]}: {error}") from error
    log_mel = torch.from_numpy(np.stack(mels)) if mels else None
    return padded.batch(log_mel=log_mel, names=names)


def recordings(reader: Reader, entries: Sequence[Entry]) -> list[tuple[Clip, ...]]:
    """What may be heard in some samples, each turn's recordings once."""
    found: dict[tuple[Clip, ...], None] = {}
    for entry in entries:
        file = reader.files[entry.source]
        if reader.is_preference:
            turns = file.preferred(entry.line, entry.offset).prompt.turns
        else:
            turns = file.conversation(entry.line, entry.offset).turns
        found |= dict.fromkeys(t.clips for t in turns if t.role == "user" and t.clips)
    return list(found)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly over all of them."""
    chosen = min(count, len(items))
    return [items[i * len(items) // chosen] for i in range(chosen)]


def evaluation_plans(entries: Sequence[Entry], batch_size: int) -> list[BatchPlan]:
    """All samples, of like length together, in a fixed order."""
    near = sorted(entries, key=lambda entry: (entry.num_rows, entry.source, entry.line))
    starts = range(0, len(near), batch_size)
    return [BatchPlan(entries=tuple(near[i : i + batch_size]), seed=None) for i in starts]


def held_out(entries: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Samples to train on and samples to evaluate on, by a hash of their place."""

    def is_held_out(entry: Entry) -> bool:
        digest = hashlib.sha256(f"{entry.source}:{entry.line}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < share * (1 << 32)

    kept = [entry for entry in entries if not is_held_out(entry)]
    return kept, [entry for entry in entries if is_held_out(entry)]


def open_template(checkpoint: Path, spec: ModelSpec) -> Template:
    """The prompts of a checkpoint. Raises ArtifactError if its tokenizer is missing or lacks the
    audio token."""
    tokenizer, encode = open_tokenizer(checkpoint)
    audio_id = tokenizer.token_to_id(AUDIO_TOKEN)
    if audio_id is None:
        raise ArtifactError(f"{checkpoint}/tokenizer.json lacks the token {AUDIO_TOKEN}")
    return Template(vocabulary=spec.vocabulary, audio_id=audio_id, encode=encode)


def open_tokenizer(checkpoint: Path) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    """A checkpoint's tokenizer, and how it encodes text without special ids. Raises ArtifactError
    if it is missing."""
    path = checkpoint / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ArtifactError(f"{path}: no readable tokenizer ({error})") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return tokenizer, encode
