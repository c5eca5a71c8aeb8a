"""Progress of long work on stderr: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

BAR_INTERVAL_S = 5.0
LINE_INTERVAL_S = 60.0


def progress(
    items: Iterable[Any] | None = None,
    *,
    name: str,
    unit: str,
    total: int | None = None,
    first: int = 0,
    is_shown: bool = True,
) -> Any:
    """A bar over `items`, or one for `total` of a `unit`, of which `first` are done already.

    Work that is shorter than a minute writes nothing into a log file.
    """
    if sys.stderr.isatty():
        file, interval_s, delay_s = None, BAR_INTERVAL_S, 0.0
    else:
        file, interval_s, delay_s = _Lines(), LINE_INTERVAL_S, LINE_INTERVAL_S
    return tqdm(
        items,
        desc=name,
        unit=unit,
        total=total,
        initial=first,
        mininterval=interval_s,
        miniters=1,  # else tqdm's own thread writes, too
        delay=delay_s,
        file=file,
        disable=not is_shown,
    )


class _Lines:
    """Each state of a bar as a line: a bar goes back to the line's start, which a file cannot."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
