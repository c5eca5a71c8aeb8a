"""Types of numeric flags: argparse refuses another number with a line that says what is
expected."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """A whole number, 1 or more. Raises argparse.ArgumentTypeError, as all of these."""
    return _whole(text, least=1)


def count_or_zero(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole(text, least=0)


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, {least} or more")
    return int(text)
