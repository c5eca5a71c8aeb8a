"""`train check`: every problem of some data, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.data.dataset import Problem, Reader, build_index
from deeptalk_edge.training.stages.recipe import Source, TaskName

DEFAULT_TASK: TaskName = "RQACONVA"


def check_data(
    checkpoint: Path, words: Sequence[str], *, max_rows: int, is_preference: bool = False
) -> tuple[int, tuple[Problem, ...]]:
    """How many samples are good, and what is wrong with the others; sounds are read whole.

    Raises ArtifactError if a file cannot be read at all, SettingsError if a task is not known.
    """
    reader = Reader(
        checkpoint=checkpoint,
        spec=read_model_spec(checkpoint),
        sources=sources_of(words),
        system="",
        max_rows=max_rows,
        is_preference=is_preference,
    )
    index = build_index(reader, is_deep=True)
    return len(index.entries), index.problems


def sources_of(words: Sequence[str]) -> tuple[Source, ...]:
    """`TASK=PATH` or `PATH`, which is read for `DEFAULT_TASK`. Raises SettingsError for a task
    that is not known."""
    return tuple(map(_source, words))


def _source(word: str) -> Source:
    task, equals, path = word.partition("=")
    if not equals:
        return Source(path=word, task=DEFAULT_TASK)
    if task not in get_args(TaskName):
        known = ", ".join(get_args(TaskName))
        raise SettingsError(f"{word}: {task} is no task; known are {known}")
    return Source(path=path, task=task)  # type: ignore[arg-type]
