"""Recipes: one TOML file says all that a run does; unknown keys are refused.

    stage = "joint"                 a row of the table (table.py)
    checkpoint = "checkpoints/s2p2" what the run starts from
    output = "runs/joint"           where its checkpoints, journal and report go

    [[data.train]]                  conversations, with the task that they are read for
    path = "audio_qa.jsonl"
    task = "AQACONVA"

The recipes beside this file hold the official hyperparameters; they are named without a path.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.schema import Between, Items, from_json
from deeptalk_edge.training.stages.objective import PreferenceMode
from deeptalk_edge.training.stages.table import RULES, Part, Rule, StageName

RECIPES = Path(__file__).resolve().parent

TaskName = Literal[
    "ASRRAW", "AQA", "AQAA", "AQACONV", "AQACONVA", "RQACONV", "RQACONVA", "TTS", "TQA", "TQAA"
]
Count = Annotated[int, Between(1, 1 << 30)]
Share = Annotated[float, Between(0, 1)]
Weight = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data file, or directory of TSV lists, read for one task."""

    path: str
    task: TaskName
    system: str = ""
    """The system text of its conversations, where they have none; "" takes `data.system`. What the
    official suffixes `_NTRL` and `_EMO` choose."""

    repeat: Count = 1
    """How often an epoch has each of its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is trained on, and how batches are made of it."""

    train: tuple[Source, ...] = ()
    evaluate: tuple[Source, ...] = ()
    system: str = ""
    """The system text; "" takes the checkpoint's own (generation_config.json)."""

    held_out: Share = 0.0
    """Of `train`: the share that is evaluated and never trained on, where `evaluate` is empty."""

    max_rows: Count = 1000
    """Longer samples are refused, and counted."""

    batch_size: Count = 16
    accumulation: Count = 1
    """Batches of a step, over all processes."""

    bad_share: Share = 0.0
    """Of the samples may be refused before the run is."""

    corrupted_codes: Share = 0.0
    """Largest share of wrong codes in the answers that the model is fed, never in what it must
    predict: so it has learnt to go on after a wrong code, and to say what the text says."""

    workers: Annotated[int, Between(0, 64)] = 0
    remember: bool = False
    """Hear every recording once, before the first step, and keep its features in memory: half the
    work of a small model's step, where the encoder is frozen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimiser:
    """AdamW with warm-up and a cosine. The defaults are the official scripts'."""

    learning_rate: Annotated[float, Between(0, 1)]
    epochs: Annotated[float, Between(0, 1e6)] = 1.0
    num_steps: Annotated[int, Between(0, 1 << 30)] = 0
    """Instead of `epochs`, if it is not 0."""

    warmup: Share = 0.03
    """Share of the steps."""

    final_rate: Share = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    weight_decay: Weight = 0.0
    clip_norm: Weight = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How the terms weigh."""

    text: Weight = 1.0
    codes: Annotated[tuple[Weight, ...], Items(1, 64)] = (1.0,) * 7
    balance: Weight = 0.001
    distillation: Weight = 1.0
    """Of `distil` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """When checkpoints are written and judged."""

    every: Count = 400
    evaluate_every: Annotated[int, Between(0, 1 << 30)] = 400
    """Steps between evaluations, where there is something to evaluate on."""

    keep: Count = 3
    """Newest checkpoints to keep, besides the best."""

    patience: Annotated[int, Between(0, 1000)] = 0
    """Evaluations without a better one before the run stops; 0 never stops early."""

    log_every: Count = 1
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Of the final checkpoint; those in between are float32, so that a run resumes exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) instead of whole tensors."""

    rank: Annotated[int, Between(1, 1024)] = 8
    alpha: Annotated[float, Between(0, 1e6)] = 16.0
    parts: Annotated[tuple[Part, ...], Items(1, 10)] = ("attention", "audio_experts")
    keep: Literal["merged", "adapter"] = "merged"
    """What the final checkpoint is: the sum, or the adapter beside its base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """DPO."""

    beta: Annotated[float, Between(0, 100)] = 0.1
    mode: PreferenceMode = "proper"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole run."""

    stage: StageName
    optimiser: Optimiser
    checkpoint: str = ""
    encoder: str = ""
    """A Whisper directory, instead of the one that the checkpoint's config names."""

    output: str = ""
    experts: str = ""
    """The split's JSON; "" takes the checkpoint's `audio_experts_file`."""

    parent: str = ""
    """`distil`: the text parent's checkpoint; "" takes `checkpoint`."""

    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    saving: Saving = field(default_factory=Saving)
    lora: Lora | None = None
    preference: Preference = field(default_factory=Preference)
    num_audio_experts: Annotated[int, Between(0, 4096)] = 0
    """`moextend`: experts to add; `random_split`: experts to draw; 0 is a quarter of all."""

    freeze_text_experts: bool = False
    train_encoder: bool = False
    train_projector: bool = False
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    explosion: Weight = 20.0
    """Stop where a loss is so many times the mean of the last 50 steps; 0 never stops."""

    tensorboard: bool = False
    seed: Annotated[int, Between(0, (1 << 31) - 1)] = 42

    @property
    def rule(self) -> Rule:
        """The stage's row of the table, with what this recipe adds to it or takes away."""
        rule = RULES[self.stage]
        trains = set(rule.trains)
        if self.freeze_text_experts:
            trains.discard("text_experts")
        if self.train_encoder:
            trains.add("encoder")
        if self.train_projector:
            trains.add("projector")
        return Rule(trains=frozenset(trains), barred=rule.barred, needs_split=rule.needs_split)

    @property
    def fingerprint(self) -> str:
        """Of all that decides what the steps do: a run that resumes must have the same."""
        content = asdict(self)
        for name in ("output", "saving", "tensorboard"):
            del content[name]
        del content["data"]["workers"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of ours by its name; `changes` are `key.of.table=value`.

    Raises SettingsError if there is no such recipe, it is not TOML, or a key or a value in it is
    not known.
    """
    path = find_recipe(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not a recipe ({error}); write it as TOML") from error
    for change in changes:
        _set(content, change)
    try:
        return from_json(Recipe, content, str(path))
    except ArtifactError as error:
        raise SettingsError(f"{error}; the recipes in {RECIPES} show what there is") from error


def find_recipe(name: str) -> Path:
    """The file of a recipe. Raises SettingsError, naming ours, if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    ours = RECIPES / f"{name.removesuffix('.toml')}.toml"
    if path.name == name and ours.is_file():
        return ours
    known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
    raise SettingsError(f"{name}: no such recipe; name a TOML file, or one of ours: {known}")


def _set(content: dict[str, Any], change: str) -> None:
    """Put one `key.of.table=value`; what is no TOML value is text."""
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {change}: expected KEY=VALUE, such as data.batch_size=8")
    try:
        read: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value.strip()
    *tables, last = key.strip().split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise SettingsError(f"--set {change}: {table} is not a table of the recipe")
    content[last] = read
