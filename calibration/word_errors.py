"""How many words of an answer were spoken wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: str) -> str:
    """The words of a text, of any script, in lower case without punctuation: to compare texts."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower()))


def spelled(text: str) -> str:
    """The words that pocketsphinx may know, in English letters: to compare with what is heard."""
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def word_errors(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Words to insert, delete or replace: Levenshtein's distance."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        left, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (word != other))
    return row[-1]
