"""How well an utterance fits the questions that a checkpoint knows, and their beginnings.

All questions are one prefix tree of words. Viterbi passes through the tree at once, with a blank
allowed between words: 1,612 questions are 2,296 nodes, where one after the other they are 14,000
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.word_head import BLANK

Array = NDArray[np.float32]

_NEVER = np.float32(-1e9)
_SURE_BLANK = np.float32(-0.001)
"""Log-probability of the blank above which a frame that follows another such frame is skipped: it
changes the order of no two paths. Two thirds of the frames of a spoken question."""


@dataclass(frozen=True, slots=True)
class PathScores:
    """Log-probabilities of the best paths over the frames that count."""

    free: float
    """Any words at all."""
    whole: float
    """A question, from its first word to its last."""
    begun: float
    """A proper beginning of a question that is no question itself."""
    question: int
    """Which question `whole` is of."""


class QuestionPaths:
    """The prefix tree of some questions over the words of a head."""

    def __init__(self, words: Sequence[str], questions: Sequence[str]) -> None:
        """Raises ValueError if there is no question, or one has a word that the head lacks."""
        labels = {word: label for label, word in enumerate(words, start=BLANK + 1)}
        nodes: dict[tuple[str, ...], int] = {(): 0}  # node 0 is the root: nothing said yet
        parents, of_nodes, ends = [0], [BLANK], {}
        for number, question in enumerate(questions):
            said = tuple(question.split())
            if not said or not labels.keys() >= set(said):
                raise ValueError(f"question {question!r}: a word that the head does not know")
            for end in range(1, len(said) + 1):
                if said[:end] not in nodes:
                    nodes[said[:end]] = len(parents)
                    parents.append(nodes[said[: end - 1]])
                    of_nodes.append(labels[said[end - 1]])
            ends[nodes[said]] = number
        if not ends:
            raise ValueError("no question")
        self._parents = np.array(parents)
        self._labels = np.array(of_nodes)
        # A word after the same word needs a blank between; after the root there is no word.
        repeats = self._labels[self._parents] == self._labels
        self._after_word = np.where(repeats | (self._parents == 0), _NEVER, np.float32(0))
        self._ends = np.array(sorted(ends))
        self._questions = np.array([ends[node] for node in self._ends])
        self._begun = np.setdiff1d(np.arange(1, len(parents)), self._ends)

    @property
    def num_nodes(self) -> int:
        return len(self._parents)

    def scores(self, log_p: Array) -> PathScores:
        """The best paths through (n, W + 1) log-probabilities of labels, n at least 1."""
        sure = log_p[:, BLANK] > _SURE_BLANK
        log_p = log_p[~(sure & np.concatenate([[False], sure[:-1]]))]
        in_word = np.full(self.num_nodes, _NEVER)
        in_blank = in_word.copy()  # the blank after a node's word; at the root, before any
        in_blank[0] = 0
        for frame in log_p:
            entered = np.maximum(in_blank[self._parents], in_word[self._parents] + self._after_word)
            blank = np.maximum(in_blank, in_word) + frame[BLANK]
            in_word = np.maximum(in_word, entered) + frame[self._labels]
            in_word[0] = _NEVER
            in_blank = blank
        best = np.maximum(in_word, in_blank)
        at_ends = best[self._ends]
        winner = int(at_ends.argmax())
        return PathScores(
            free=float(log_p.max(axis=1).sum()),
            whole=float(at_ends[winner]),
            begun=float(best[self._begun].max()) if self._begun.size else float(_NEVER),
            question=int(self._questions[winner]),
        )
