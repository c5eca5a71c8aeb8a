"""Neither our code nor our imports open connections or write outside of the outputs.

A child runs in a separate network namespace, with a home directory that is compared before and
after, and under a shim that logs every call for a socket, a connection or a name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deeptalk_edge.sound.wav import WavWriter
from tests.places import ROOT
from tests.runtime.sounds import silence
from tests.shims import build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKPOINT = ROOT / "checkpoints/tiny"
QUESTION = next(CHECKPOINT.glob("questions/*-0.wav"))

NOTED_CALLS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
static void note(const char *call, long detail) {
    FILE *file = fopen(getenv("NOTED_CALLS"), "a");
    if (file) { fprintf(file, "%s %ld\n", call, detail); fclose(file); }
}
int socket(int domain, int type, int protocol) {
    int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    note("socket", domain);
    return real(domain, type, protocol);
}
int connect(int fd, const struct sockaddr *to, socklen_t size) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    note("connect", to->sa_family);
    return real(fd, to, size);
}
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    note("getaddrinfo", 0);
    return real(node, service, hints, found);
}
"""


class Watch:
    """A sandbox without a network that records a command's calls and files."""

    def __init__(self, place: Path) -> None:
        self._place, self._shim = place, build(NOTED_CALLS, place)
        self._calls = place / "calls"
        for name in ("home", "tmp", "work"):
            (place / name).mkdir()

    def run(self, *command: str | Path, python: Path | str = sys.executable) -> list[str]:
        """Run Python with these arguments; returns its forbidden calls and files."""
        done = subprocess.run(
            [*_isolated(), str(python), *map(str, command)],
            cwd=self._place / "work",
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        calls = self._calls.read_text().splitlines() if self._calls.exists() else []
        left = [path for name in ("home", "tmp") for path in (self._place / name).rglob("*")]
        return calls + [str(path.relative_to(self._place)) for path in left]

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return kept | {
            "HOME": str(self._place / "home"),
            "TMPDIR": str(self._place / "tmp"),
            "LD_PRELOAD": str(self._shim),
            "NOTED_CALLS": str(self._calls),
            "PYTHONPATH": str(ROOT),
        }


def _isolated() -> list[str]:
    """The command prefix that removes the network; skips the test if none works."""
    for words in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*words, "true"], check=False).returncode:
            return words
    pytest.skip("this machine gives no network namespace (unshare -n): no connection was watched")


def _venv_of_the_oldest(place: Path) -> Path:
    """Python with the lowest allowed version of each package of a device or an export."""
    if sys.version_info >= (3, 13):
        pytest.skip("numpy 1.26, the oldest that we allow, has no wheel for this Python")
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = about["dependencies"] + about["optional-dependencies"]["export"]
    oldest = [line.replace(">=", "==") for line in needed]
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin/python"
    flags = ["-q", "--disable-pip-version-check", "--only-binary=:all:"]
    subprocess.run([str(python), "-m", "pip", "install", *flags, *oldest], check=True)
    return python


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


def _use_everything(watch: Watch, place: Path, python: Path | str = sys.executable) -> list[str]:
    """Export, ask and talk; returns the forbidden calls and files."""
    cli, bundle, spoken = ("-m", "deeptalk_edge.cli"), place / "bundle", place / "spoken.wav"
    with WavWriter(spoken, 16_000) as writer:
        writer.write(silence(1.0))
    run = (*cli, "run", "--bundle", bundle, "--backend", "ort")
    watch.run(*cli, "export", CHECKPOINT, "-o", bundle, python=python)
    watch.run(*run, "--wav", QUESTION, "--out", place / "answer.wav", python=python)
    talk = ("--mic", "--input-device", spoken)
    return watch.run(*run, *talk, python=python)


def test_export_run_and_mic_open_no_connection_and_leave_no_files(
    watch: Watch, tmp_path: Path
) -> None:
    assert _use_everything(watch, tmp_path) == []
    assert (tmp_path / "answer.wav").stat().st_size > 10_000


@pytest.mark.slow
def test_the_oldest_allowed_versions_open_no_connection_and_leave_no_files(
    watch: Watch, tmp_path: Path
) -> None:
    python = _venv_of_the_oldest(tmp_path / "venv")
    assert _use_everything(watch, tmp_path, python) == []


def test_a_connection_and_a_file_at_home_are_detected(watch: Watch) -> None:
    script = "import pathlib, socket; (pathlib.Path.home() / 'id').touch(); "
    script += "socket.socket().connect_ex(('192.0.2.1', 9))"
    assert watch.run("-c", script) == ["socket 2", "connect 2", "home/id"]


def test_a_users_choice_about_telemetry_is_kept() -> None:
    script = "import os, deeptalk_edge; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for before, after in ((None, "1"), ("0", "0")):
        chosen = {"ORT_DISABLE_TELEMETRY": before} if before else {}
        kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=kept | chosen, capture_output=True, text=True
        )
        assert done.stdout.strip() == after
