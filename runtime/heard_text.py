"""How much of an answer's text belongs with the sound that a listener got, rounded down."""

from __future__ import annotations

from deeptalk_edge.model.spec import CodecSpec, TextAlignment

_SLOW_IDS_PER_S = 2.5
"""Text ids of slow speech; bounds what was heard of a text that runs ahead of its speech."""


def num_heard_ids(
    heard_samples: int,
    *,
    num_ids: int,
    num_samples: int,
    is_speech_done: bool,
    codec: CodecSpec,
    alignment: TextAlignment,
) -> int:
    """Text ids that belong with the first `heard_samples` of an answer; the first one, BOS, in any
    case.

    So far the answer has `num_ids` and `num_samples`. With the alignment `word`, a word is in the
    row of the frame that begins it; otherwise the text runs ahead.
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
