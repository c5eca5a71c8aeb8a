"""`understanding.json` and `understanding.npz`: what tells a checkpoint's questions from anything
else. Optional, in a checkpoint and in a bundle, where both are the same files.

json    words of the head, known questions, scores of cues
npz     head_norm_weight, head_norm_bias (C), head_weight (W + 1, C), head_bias (W + 1); absent
        without a head. distance_mean (2 C), distance_basis (2 C, R), distance_variances (R + 1)
wav     `not_understood.wav`, mono, the codec's rate: what is said in an answer's place; optional
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.question_paths import QuestionPaths
from deeptalk_edge.model.understanding import CueName, Manifold, Score
from deeptalk_edge.model.word_head import WordHead
from deeptalk_edge.schema import Items, Text, from_json, read_json

HEADER, ARRAYS, LINE = "understanding.json", "understanding.npz", "not_understood.wav"
FILES = (HEADER, ARRAYS, LINE)

_Word = Annotated[str, Text(r"\S+", "a word without spaces")]
_OF_MANIFOLD = ("mean", "basis", "variances")
_HEAD_ARRAYS = ("norm_weight", "norm_bias", "weight", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The JSON file."""

    words: Annotated[tuple[_Word, ...], Items(0, 1 << 16)] = ()
    questions: Annotated[tuple[str, ...], Items(0, 1 << 16)] = ()
    """Known to the checkpoint, in words of the head."""
    before_prefill: Score | None = None
    """That it is a question, from cues of the features alone."""
    before_sound: Score | None = None
    """That the answer is right, from those and the entropy of its first rows."""
    complete: Score | None = None
    """That the question is whole."""
    source: str = ""
    """What it was fitted on."""


@dataclass(frozen=True, slots=True)
class Understanding:
    """Both files, read."""

    header: Header
    head: WordHead | None
    manifold: Manifold | None

    def paths(self) -> QuestionPaths | None:
        """The tree of the known questions; None without a head or without questions."""
        if self.head is None or not self.header.questions:
            return None
        return QuestionPaths(self.header.words, self.header.questions)

    def save(self, directory: Path) -> None:
        """Write both files."""
        content = json.dumps(dataclasses.asdict(self.header), indent=1)
        (directory / HEADER).write_text(content + "\n", encoding="utf-8")
        arrays: dict[str, NDArray[Any]] = {}
        if self.head is not None:
            arrays |= {f"head_{name}": getattr(self.head, name) for name in _HEAD_ARRAYS}
        if self.manifold is not None:
            arrays |= {f"distance_{name}": getattr(self.manifold, name) for name in _OF_MANIFOLD}
        np.savez(directory / ARRAYS, **arrays)  # type: ignore[arg-type]


def read_understanding(directory: Path, width: int) -> Understanding | None:
    """Read what a checkpoint or a bundle has for features of this width (C); None if it has
    nothing.

    Raises ArtifactError if the files do not fit one another or the width.
    """
    if not (directory / HEADER).is_file():
        return None
    header = from_json(Header, read_json(directory / HEADER), str(directory / HEADER))
    _check_cues(directory / HEADER, header)
    names = _names(directory / ARRAYS)
    head = manifold = None
    if header.words:
        labels = len(header.words) + 1
        sizes: dict[str, tuple[int | str, ...]] = {
            "norm_weight": (width,),
            "norm_bias": (width,),
            "weight": (labels, width),
            "bias": (labels,),
        }
        forms: dict[str, Form] = {f"head_{name}": (np.float32, sizes[name]) for name in sizes}
        arrays = _finite(directory, forms)
        head = WordHead(header.words, *(arrays[f"head_{name}"] for name in _HEAD_ARRAYS))
    if "distance_mean" in names:
        forms = {
            "distance_mean": (np.float32, (2 * width,)),
            "distance_basis": (np.float32, (2 * width, "R")),
            "distance_variances": (np.float32, ("V",)),
        }
        arrays = _finite(directory, forms)
        manifold = Manifold(*(arrays[f"distance_{name}"] for name in _OF_MANIFOLD))
        if len(manifold.variances) != manifold.basis.shape[1] + 1 or manifold.variances.min() <= 0:
            raise ArtifactError(
                f"{directory / ARRAYS}: distance_variances: expected one above 0 for each of the "
                f"{manifold.basis.shape[1]} directions and one more; fit it again"
            )
    found = Understanding(header, head, manifold)
    try:
        found.paths()
    except ValueError as error:
        raise ArtifactError(f"{directory / HEADER}: {error}; fit it again") from error
    return found


def _check_cues(path: Path, header: Header) -> None:
    known = get_args(CueName)
    for score in (header.before_prefill, header.before_sound, header.complete):
        for name in score.weights if score else ():
            if name not in known:
                raise ArtifactError(f"{path}: cue {name!r}; known are {', '.join(known)}")


def _names(path: Path) -> set[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except Exception as error:  # numpy, zipfile and zlib share no base
        raise ArtifactError(f"{path}: not readable ({error}); export the bundle again") from error


def _finite(directory: Path, forms: dict[str, Form]) -> dict[str, NDArray[np.float32]]:
    arrays = read_arrays(directory / ARRAYS, forms)
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{directory / ARRAYS}: {name} has values that are not finite")
    return arrays
