"""How much of an answer's text belongs to the sound that was heard, rounded down."""

from __future__ import annotations

from deeptalk_edge.model.spec import CodecSpec, TextAlignment

_SLOW_IDS_PER_S = 2.5
"""Text ids per second of slow speech; bounds the heard part of a text that runs ahead of its
speech."""


def num_heard_ids(
    heard_samples: int,
    *,
    num_ids: int,
    num_samples: int,
    is_speech_done: bool,
    codec: CodecSpec,
    alignment: TextAlignment,
) -> int:
    """Number of text ids that belong to the first `heard_samples` of an answer, at least 1, the
    BOS.

    The answer has `num_ids` and `num_samples` so far. With the alignment `word`, a word is in the
    row of the frame that begins it; otherwise the text runs ahead of the speech.
    """
    if is_speech_done and heard_samples >= num_samples:
        return num_ids
    if alignment == "word":
        heard = heard_samples // codec.frame_samples
    elif is_speech_done:
        heard = num_ids * heard_samples // num_samples
    else:
        heard = int(heard_samples / codec.sampling_rate * _SLOW_IDS_PER_S)
    return max(heard, 1)
