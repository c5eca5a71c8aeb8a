"""Compiles the native CPU library: one file per instruction set, each with its own flags.

`pip install` (setup.py), the tests and `make sanitize` use it; it needs only a C++17 compiler.

    python native/cpu/build.py TARGET.so [--compiler 'aarch64-linux-gnu-g++'] [--flag=-O1 ...]
    python native/cpu/build.py PROGRAM --check    the kernels' own test program instead
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
KEPT = SOURCES.parents[1] / "build" / "native"
CHECKS = ("check", "check_hostile")  # only in the check program
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c"
_X86_FLAGS = {
    "path_avx512_bf16": f"{_AVX512} -mavx512bf16",
    "path_avx512": _AVX512,
    "path_avx512_intel": _AVX512,
    "path_avx2_vnni": "-mavx2 -mfma -mf16c -mavxvnni",
    "path_avx2": "-mavx2 -mfma -mf16c",
}
_ARM_FLAGS = {
    "path_neon_i8mm": "-march=armv8.2-a+dotprod+i8mm",
    "path_neon": "-march=armv8.2-a+dotprod",
}
_ZIG_ARM_FLAGS = {  # zig's spelling
    "path_neon_i8mm": "-mcpu=generic+v8_2a+dotprod+i8mm",
    "path_neon": "-mcpu=generic+v8_2a+dotprod",
}
_LINKED = ["-static-libstdc++", "-static-libgcc", f"-Wl,--version-script={SOURCES}/exports.map"]
_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]


def build(
    target: Path,
    compiler: str = "c++",
    flags: tuple[str, ...] = ("-O3",),
    *,
    is_check: bool = False,
    x86_paths: Container[str] | None = None,
) -> Path:
    """Compile and link the library at `target`, or a program that checks the kernels; `flags` are
    for every file and the linker. Of x86 kernel paths those of `x86_paths` alone, or all.

    Raises RuntimeError with the compiler's messages if it fails, OSError if there is no compiler.
    """
    command = shlex.split(compiler)
    macros = _macros(command)
    own_flags = {}
    if " __x86_64__ " in macros:  # without its flags a path's file is empty
        own_flags = {
            stem: own
            for stem, own in _X86_FLAGS.items()
            if x86_paths is None or stem.removeprefix("path_").replace("_", "-") in x86_paths
        }
    if " __aarch64__ " in macros:
        own_flags = _ZIG_ARM_FLAGS if "zig" in compiler else _ARM_FLAGS
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:

        def compile_one(source: Path) -> str:
            place = str(Path(folder) / f"{source.stem}.o")
            own = own_flags.get(source.stem, "").split()
            if source.stem in CHECKS:
                own.append("-O1")  # double references at -O0 take a sanitizer's run thrice as long
            _run([*command, *_COMMON, *flags, *own, "-c", str(source), "-o", place])
            return place

        sources = [
            path for path in sorted(SOURCES.glob("*.cpp")) if is_check or path.stem not in CHECKS
        ]
        places = list(threads.map(compile_one, sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.partial")
        kind = [] if is_check else ["-shared", *_LINKED]
        _run([*command, *flags, *kind, *places, "-o", str(staged), "-pthread"])
        staged.replace(target)
    return target


def kept(
    compiler: str = "c++",
    flags: tuple[str, ...] = ("-O3",),
    *,
    is_check: bool = False,
    x86_paths: Sequence[str] | None = None,
) -> Path:
    """What `build` makes, kept under build/ by a hash of compiler, flags and sources: an
    installation and every test share it. Raises as `build`."""
    command = shlex.split(compiler)
    choices = (_macros(command), command[1:], flags, is_check, x86_paths)
    digest = hashlib.sha256(repr(choices).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    name = "check" if is_check else "libdeeptalk_cpu.so"

    def make(place: Path) -> None:
        build(place, compiler, flags, is_check=is_check, x86_paths=x86_paths)

    return made_once(KEPT / digest.hexdigest()[:16] / name, make)


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, which the first process that asks makes while others wait for it. `make` puts it
    there whole, by a renaming."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_file():
            make(place)
    return place


def _macros(command: list[str]) -> str:
    """What a compiler defines: its version and its target among others."""
    return _run([*command, "-dM", "-E", "-x", "c", "/dev/null"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--flag", action="append", default=[])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    flags = tuple(args.flag) or ("-O3",)
    print(build(args.target, args.compiler, flags, is_check=args.check))


if __name__ == "__main__":
    main()
