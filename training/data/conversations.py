"""Conversations from files, in the official formats, each with the place that it comes from.

JSON     a list of conversations
JSONL    one a line; read by its place in the file, never as a whole
TSV      lists of one turn each, line by line alike: `audio_in`, `text_in`, `text_out`, `codec_out`
         (.tsv: a root directory, then `path TAB length [TAB start TAB end]`; .wrd: a text a line)

A conversation is a list of turns, or an object with `conversations`. Source: DeepTalk
`data_util.py`, `mm_data_util.py`, `run_scripts/parse_data_dir.sh`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deeptalk_edge.errors import ArtifactError

Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")
_TSV_KINDS = ("audio_in.tsv", "text_in.wrd", "text_out.wrd", "codec_out.tsv")


class BadSample(Exception):
    """What is wrong with one sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A recording, or a stretch of it in samples."""

    path: Path
    start: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side says."""

    role: Role
    text: str
    clips: tuple[Clip, ...] = ()
    """Its sound; several are heard one after the other."""

    codes: tuple[int, ...] | Path | None = None
    """Seven a codec frame, or the file that holds them."""

    speaker: str = "ANS_A"
    word_frames: tuple[int, ...] | None = None
    """Ours: the codec frame in which each word's sound begins, for checkpoints whose text is
    aligned by words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The turns of one sample."""

    turns: tuple[Turn, ...]
    name: str
    """File and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferred:
    """A prompt with a better and a worse spoken answer: DPO's data."""

    prompt: Conversation
    win: tuple[int, ...] | Path
    lose: tuple[int, ...] | Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample is; cheap to keep for millions."""

    file: int
    line: int
    offset: int


class SampleFile:
    """The samples of one data file, read one at a time. Raises ArtifactError if it cannot be
    read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: list[Any] | None = None
        try:
            if path.is_dir():
                self._whole = list(_tsv_items(path))
            elif path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, list):
                    raise ArtifactError(f"{path}: expected a JSON list of conversations")
                self._whole = content
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path}: not readable ({error})") from error

    def places(self) -> Iterator[tuple[int, int]]:
        """Number of the line or item, from 1, and where it begins."""
        if self._whole is not None:
            yield from ((i + 1, i) for i in range(len(self._whole)))
            return
        try:
            with self.path.open("rb") as file:
                offset = 0
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        yield line, offset
                    offset += len(text)
        except OSError as error:
            raise ArtifactError(f"{self.path}: not readable ({error})") from error

    def item(self, line: int, offset: int) -> tuple[Any, str]:
        """One sample as its file has it, and its name. Raises BadSample if it is not JSON."""
        name = f"{self.path}:{line}"
        if self._whole is not None:
            return self._whole[offset], name
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.readline()
        try:
            return json.loads(text), name
        except (ValueError, RecursionError) as error:
            raise BadSample(f"not a line of JSON ({error})") from error

    def conversation(self, line: int, offset: int) -> Conversation:
        """One sample. Raises BadSample, saying what is wrong."""
        item, name = self.item(line, offset)
        return read_conversation(item, name, self.path.parent)

    def preferred(self, line: int, offset: int) -> Preferred:
        """One pair. Raises BadSample, saying what is wrong."""
        item, name = self.item(line, offset)
        if not isinstance(item, dict) or not {"win_codec", "lose_codec"} <= item.keys():
            raise BadSample("a pair needs `win_codec` and `lose_codec`")
        root = self.path.parent
        return Preferred(
            prompt=read_conversation(item, name, root),
            win=_codes(item["win_codec"], root),
            lose=_codes(item["lose_codec"], root),
        )


def read_conversation(item: Any, name: str, root: Path) -> Conversation:
    """A sample's turns; paths are relative to `root`. Raises BadSample, saying what is wrong."""
    turns = item.get("conversations") if isinstance(item, dict) else item
    if not isinstance(turns, list) or not turns:
        raise BadSample("expected a list of turns, or an object with `conversations`")
    read = tuple(_turn(turn, root) for turn in turns)
    if read[0].role == "assistant":
        raise BadSample("the first turn is the assistant's")
    return Conversation(turns=read, name=name)


def _turn(turn: Any, root: Path) -> Turn:
    if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
        found = turn.get("role") if isinstance(turn, dict) else turn
        raise BadSample(f"a turn's role is {found!r:.40}, expected one of {', '.join(_ROLES)}")
    text = turn.get("content", "")
    if not isinstance(text, str):
        raise BadSample("a turn's content is no text")
    wavs = turn.get("wavpath")
    wavs = [] if wavs in (None, "") else wavs if isinstance(wavs, list) else [wavs]
    starts = turn.get("word_frames")
    return Turn(
        role=turn["role"],
        text=text,
        clips=tuple(_clip(wav, root) for wav in wavs),
        codes=None if turn.get("codec") in (None, "") else _codes(turn["codec"], root),
        speaker=str(turn.get("speaker") or "ANS_A"),
        word_frames=None if starts is None else _numbers(starts, "word_frames"),
    )


def _clip(wav: Any, root: Path) -> Clip:
    if isinstance(wav, str):
        return Clip(path=root / wav)
    if isinstance(wav, dict) and isinstance(wav.get("wavpath"), str):
        start, end = wav.get("start") or 0, wav.get("end")
        if isinstance(start, int) and (end is None or isinstance(end, int)):
            return Clip(path=root / wav["wavpath"], start=start, end=end)
    raise BadSample(f"wavpath {wav!r:.60} is no path, nor {{wavpath, start, end}}")


def _codes(codec: Any, root: Path) -> tuple[int, ...] | Path:
    if isinstance(codec, str):
        return root / codec
    return _numbers(codec, "codec")


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise BadSample(f"{what} is {values!r:.40}, expected a path or a list of whole numbers")
    return tuple(values)


def read_code_file(path: Path) -> tuple[int, ...]:
    """The codes of a file of one line. Raises BadSample if it is no such file."""
    try:
        return tuple(map(int, path.read_text(encoding="ascii").split()))
    except (OSError, ValueError) as error:
        raise BadSample(f"codes {path}: {error}") from error


# TSV ----------------------------------------------------------------------------------------------


def _tsv_items(directory: Path) -> Iterator[Mapping[str, Any]]:
    """The single turns that a directory's lists make up, as conversations."""
    lists = {kind: directory / kind for kind in _TSV_KINDS if (directory / kind).is_file()}
    if not lists:
        raise ArtifactError(f"{directory}: holds none of {', '.join(_TSV_KINDS)}")
    readers: dict[str, Callable[[Path], Sequence[Any]]] = {".tsv": _tsv_paths, ".wrd": _texts}
    columns = {kind: readers[path.suffix](path) for kind, path in lists.items()}
    lengths = {kind: len(column) for kind, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ArtifactError(f"{directory}: the lists are not equally long: {lengths}")
    for i in range(next(iter(lengths.values()))):
        row = {kind.partition(".")[0]: column[i] for kind, column in columns.items()}
        user = {"role": "user", "content": row.get("text_in", ""), "wavpath": row.get("audio_in")}
        codec = row.get("codec_out")
        answer = {
            "role": "assistant",
            "content": row.get("text_out", ""),
            "codec": codec["wavpath"] if codec else None,
        }
        yield {"conversations": [user, answer]}


def _texts(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _tsv_paths(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ArtifactError(f"{path}: empty; its first line is a root directory")
    root, found = path.parent / lines[0].strip(), []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) not in (2, 4) or not all(field.isdigit() for field in fields[1:]):
            raise ArtifactError(
                f"{path}:{number}: expected `path TAB length` or `path TAB length TAB start TAB "
                f"end`, found {line!r:.60}"
            )
        clip: dict[str, Any] = {"wavpath": str(root / fields[0])}
        if len(fields) == 4:
            clip |= {"start": int(fields[2]), "end": int(fields[3])}
        found.append(clip)
    return found
