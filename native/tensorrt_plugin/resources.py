"""Run a compiler command and show ptxas's registers, shared memory and spills as a table.

python resources.py -- nvcc ... -Xptxas=-v ...
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict

_PTXAS = re.compile(r"^(ptxas|nvcc) info.*|^ +\d+ bytes stack frame.*")
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\w+)'"
    r".*?(?P<spill>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def kernel_of(name: str) -> str:
    """Name of the kernel with the parameters that set its registers: weights and number of
    columns."""
    plain = re.search(r"(plan|combine)_kernel", name)
    if plain:
        return plain[0]
    weights = re.search(r"(Float|Int8|Int4)WeightsINS_\d+(\w+?16)E(?:Li(\d+))?", name)
    columns = re.search(r"Li(\d+)ELb[01]ELb([01])", name)
    if not weights or not columns:
        return name
    group = f"-{weights[3]}" if weights[3] else ""
    phase = "decode" if columns[2] == "1" else f"prefill x{8 * int(columns[1])}"
    return f"ffn {weights[1].lower()}{group} {phase}"


def table(log: str) -> str:
    """Largest registers, shared memory and spills per compute capability and kernel."""
    most: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for entry in re.split(r"(?=ptxas info *: Compiling entry)", log):
        if match := _ENTRY.search(entry):
            row = most[int(re.sub(r"\D", "", match["sm"])), kernel_of(match["name"])]
            found = (match["registers"], match["shared"] or 0, match["spill"])
            row[:] = [max(old, int(new)) for old, new in zip(row, found, strict=True)]
    lines = ["sm   kernel                     registers  shared bytes  spilled bytes"]
    for (sm, kernel), (registers, shared, spilled) in sorted(most.items()):
        lines.append(f"{sm:<4} {kernel:<26} {registers:>9} {shared:>13} {spilled:>14}")
    return "\n".join(lines) if most else ""


def main() -> int:
    command = sys.argv[sys.argv.index("--") + 1 :]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    rest = "\n".join(line for line in log.splitlines() if not _PTXAS.match(line))
    print(rest + table(log), end="\n" if log.strip() else "", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
