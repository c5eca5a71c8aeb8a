"""Whether a question gets the model's answer, judged while that answer is written.

refused   a spoken line takes the answer's place
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.decoding import Decoding
from deeptalk_edge.runtime.events import AudioChunk, NotUnderstood, Piece, Pieces
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.runtime.understanding import Judge, Judgement

Array = NDArray[np.float32]


class Verdict:
    """On one question; a typed one is not judged."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.judgement: Judgement | None = None
        """What is known so far; None until a spoken question is encoded."""
        self.is_refused = False
        """Whether the line was said."""

    def judge_features(self, features: Array) -> Judgement:
        """Of a spoken question, (n, C), before it is fed."""
        self.judgement = self._judge.of_features(features)
        return self.judgement

    def refuse(self, judgement: Judgement) -> Pieces:
        """Say the line instead of the answer."""
        self.is_refused = True
        refusal = NotUnderstood(judgement.understood_p or 0.0)
        return (refusal, AudioChunk(self._judge.line)) if self._judge.line.size else (refusal,)

    def judged(self, decoding: Decoding, logits: Logits) -> Generator[Pieces, None, None]:
        """What an answer's rows bring, until the entropy of the first ones refuses the question;
        what was written until then is dropped."""
        judgement = self.judgement
        if judgement is None:
            yield from decoding.run(logits)
            return
        waits, held = judgement.waits_for_entropy, list[Piece]()
        is_known = False
        for pieces in decoding.run(logits):
            if not is_known and (mean := decoding.text_entropy) is not None:
                is_known = True
                judgement.add_entropy(mean)
                if waits and judgement.is_refused:
                    yield self.refuse(judgement)
                    return
            if waits and not is_known:
                held += pieces
                yield ()
                continue
            yield (*held, *pieces)
            held.clear()
        yield tuple(held)
