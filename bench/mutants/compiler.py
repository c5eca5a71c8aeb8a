"""Replaces the C++ compilers while faults are tried: it caches objects by the hash of their source.

So a fault in one file recompiles only the files that include it. It uses -O1 instead of -O3, which
compiles three times as fast and is as exact. It is a separate program that imports nothing of the
project.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    compiler = os.environ[f"DEEPTALK_MUTANTS_{Path(sys.argv[0]).name}"]
    arguments = ["-O1" if each == "-O3" else each for each in sys.argv[1:]]
    if "-o" not in arguments or not any(map(_is_source, arguments)):
        os.execv(compiler, [compiler, *arguments])
    target = arguments.index("-o") + 1
    kept = Path(os.environ["DEEPTALK_MUTANTS_OBJECTS"]) / f"{_hash(compiler, arguments, target)}.o"
    if not kept.is_file():
        staged = kept.with_suffix(f".{os.getpid()}")
        own = [*arguments[:target], str(staged), *arguments[target + 1 :]]
        done = subprocess.run([compiler, *own], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        staged.replace(kept)
    shutil.copy(kept, arguments[target])  # keeps a program executable


def _hash(compiler: str, arguments: list[str], target: int) -> str:
    """Hash of the preprocessed source and the flags."""
    flags = [each for i, each in enumerate(arguments) if i not in (target - 1, target)]
    expand = [compiler, "-E", "-P", *(each for each in flags if each != "-c")]
    done = subprocess.run(expand, capture_output=True, check=False)
    flags = [each for each in flags if not _is_source(each)]
    return hashlib.sha256(repr(flags).encode() + done.stdout).hexdigest()[:32]


def _is_source(argument: str) -> bool:
    return argument.endswith((".cpp", ".cu"))


if __name__ == "__main__":
    main()
