"""Any flags over any files: an exit code and a line, never a traceback, a hang or a lost file."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from deeptalk_edge import files
from deeptalk_edge.bundle.signature import generate_keys
from deeptalk_edge.cli import main
from tests.disks import make_node
from tests.export.checkpoints import write_checkpoint as write_export_checkpoint
from tests.runtime.sounds import PCM, encode, silence, voice, wav_bytes

EXIT_CODES = {0, 1, 2, 129, 130, 143}

NOT_UTF8 = os.fsdecode(b"\xff\xfe.wav")

FILES = (
    *("question.wav", "silence.wav", "answer.wav", NOT_UTF8, "empty.wav", "text.txt", "cut.wav"),
    *("folder", "folder/deep.wav", "absent/file.wav", "absent.wav", "closed", "unreadable.wav"),
    *("link.wav", "dangling.wav", "loop.wav", "second_name.wav", "fifo.wav", "-"),
    *("null", "zero.wav", "full.wav", "maker.key", "maker.pub", "checkpoint", "bundle"),
    *("bundle/experts.bin", "bundle/manifest.json", ".", "..", "x" * 256, ""),
)

_FILE = st.sampled_from(FILES)


def _flag(name: str, values: SearchStrategy[str] = _FILE) -> SearchStrategy[list[str]]:
    return values.map(lambda value: [name, value])


def _flags(*choices: SearchStrategy[list[str]]) -> SearchStrategy[list[str]]:
    """A few of the flags, in any order."""
    chosen = st.lists(st.one_of(choices), max_size=4)
    return chosen.map(lambda lists: [word for words in lists for word in words])


def _just(*words: str) -> SearchStrategy[list[str]]:
    return st.just(list(words))


# Mostly a good bundle, so that later checks are reached.
_BUNDLE = st.one_of(st.just("bundle"), st.just("bundle"), st.just("bundle"), _FILE)
_SOUND = st.one_of(st.just("question.wav"), _FILE)

RUN = st.tuples(
    _flag("--bundle", _BUNDLE),
    st.one_of(_flag("--wav", _SOUND), _just("--text", "Why?"), _just("--text", "Why?", "-v")),
    _flags(
        _flag("--out"),
        _flag("--record-routes"),
        _flag("--require-signature"),
        _flag("--wav"),
        _flag("--mode", st.sampled_from(["text", "single", "wrong"])),
        _flag("--pool", st.sampled_from(["1", "0", "42%", "-1", "x", "1e9"])),
        _flag("--seed", st.sampled_from(["1", "-1", "x", "99999999999999999999"])),
        _flag("--threads", st.sampled_from(["1", "0", "x"])),
        _flag("--max-turns", st.sampled_from(["1", "0", "all", "x"])),
        _flag("--speaker", st.sampled_from(["", "M29", "\udcff"])),
        _flag("--system", st.sampled_from(["", "Be brief.", "\udcff"])),
        *(_just(word) for word in ("--json", "--forget", "--as-released", "--trace")),
    ),
).map(lambda parts: ["run", *parts[0], *parts[1], *parts[2]])

# Never without a WAV as the microphone: a machine may have a real one.
TALK = st.tuples(
    _flag("--bundle", _BUNDLE),
    _flag("--input-device", st.sampled_from([name for name in FILES if name.endswith(".wav")])),
    _flags(
        *(_flag(f"--{name}") for name in ("output-device", "record", "trace", "record-routes")),
        *(_flag(f"--{name}") for name in ("turn-model", "require-signature")),
        *(_just(word) for word in ("--json", "--no-speculation", "--no-echo-canceller")),
    ),
).map(lambda parts: ["run", "--mic", "--hangover", "fixed", *parts[0], *parts[1], *parts[2]])

EXPORT = st.tuples(
    st.one_of(st.just("checkpoint"), _FILE),
    st.one_of(_just(), _flag("-o")),
    _flags(
        *(_flag(name) for name in ("--encoder", "--snac", "--plugin", "--device")),
        _flag("--backend", st.sampled_from(["ort", "cpu", "native", "fake", "tensorrt", "wrong"])),
        _flag("--precision", st.sampled_from(["experts=int8", "experts=x", "x", "kv_cache=int8"])),
        *(_just(word) for word in ("--force", "--force", "--dry-run", "--json")),
    ),
).map(lambda parts: ["export", parts[0], *parts[1], *parts[2]])

BUNDLE = st.one_of(
    st.tuples(
        st.sampled_from(["inspect", "verify", "sign"]),
        _BUNDLE,
        _flags(_flag("--key"), _just("--json")),
    ).map(lambda parts: ["bundle", parts[0], parts[1], *parts[2]]),
    _FILE.map(lambda name: ["bundle", "keygen", name]),
)

MEASURE = st.tuples(
    _flag("--bundle", _BUNDLE),
    st.one_of(_flag("--wav", _SOUND), _just("--text", "Why?"), _just("--text", "")),
    _flag("--repeat", st.sampled_from(["1", "0", "x"])),
    _flags(_flag("--mode", st.sampled_from(["text", "wrong"])), _just("--json")),
).map(lambda parts: ["profile", "--offline", *parts[0], *parts[1], *parts[2], *parts[3]])

# A turn by voice takes seconds, so here are flags that are refused before a turn.
PROFILE = st.tuples(
    _flag("--bundle", _BUNDLE),
    _flag("--turns", st.sampled_from(["0", "-1", "x"])),
    _flags(_flag("--wav"), _flag("--samples"), _flag("-o"), _just("--cut", "0"), _just("--json")),
).map(lambda parts: ["profile", *parts[0], *parts[1], *parts[2]])

PLAN = st.tuples(
    _flag("--device", st.one_of(st.sampled_from(["thor", "cpu", "x"]), _FILE)),
    st.one_of(
        _flag("--checkpoint"), _just("--checkpoint", "checkpoint"), _flag("--bundle", _BUNDLE)
    ),
    _flags(
        _flag("--question", st.sampled_from(["1", "0", "nan", "x"])),
        _flag("--context", st.sampled_from(["1", "-1", "99999999999"])),
        _flag("--power-mode", st.sampled_from(["15W", "MAXN"])),
        _flag("--precision", st.sampled_from(["experts=int8", "experts=x", "x"])),
        _flag("--svg"),
        _just("--json"),
    ),
).map(lambda parts: ["plan", *parts[0], *parts[1], *parts[2]])

PROBE = st.tuples(_flags(_flag("--place"), _just("--json"))).map(
    lambda parts: ["probe", "--identify-only", *parts[0]]
)

ROUTES = st.tuples(
    st.sampled_from(["show", "replay"]),
    _FILE,
    _flags(_flag("--profile"), _flag("--pool", st.sampled_from(["1", "x"])), _just("--json")),
).map(lambda parts: ["routes", parts[0], parts[1], *parts[2]])

# Only tests/runtime/sound_card uses PortAudio: the system's sound libraries abort a process that
# has lost a sound server before, which happens in those tests.
SOUND = _FILE.map(lambda name: ["sound", name])

# Places that a verb may write or replace, by the flag before the name.
_OUTPUT_FLAGS = (
    *("--out", "--record-routes", "--output-device", "--record", "--trace", "-o"),
    *("--samples", "--svg"),
)

_INPUT_FLAGS = ("--wav", "--input-device", "--require-signature", "--turn-model", "--key")

ASK = ["run", "--bundle", "bundle", "--wav", "question.wav"]
EXPORT_TO = ["export", "checkpoint", "-o"]

# Flags that once ended in a traceback, a hang or a lost file.
KNOWN = [
    [*ASK, "--out", "null"],
    [*ASK, "--record-routes", "null"],
    [*ASK, "--out", "fifo.wav"],
    [*ASK, "--out", "link.wav"],
    [*ASK, "--out", "question.wav"],
    [*ASK, "--out", "second_name.wav"],
    [*ASK, "--out", "full.wav"],
    [*ASK, "--out", ".", "--text", "Why?"],
    [*ASK, "--out", "bundle/experts.bin"],
    [*ASK, "--record-routes", "absent/file.wav"],
    [*ASK, "--system", "\udcff"],
    [*ASK, "--seed", str(2**64)],
    ["run", "--bundle", "bundle", "--wav", "zero.wav"],
    ["run", "--bundle", "bundle", "--wav", "fifo.wav"],
    ["run", "--bundle", NOT_UTF8, "--text", "Why?"],
    [*EXPORT_TO, "folder", "--force"],
    [*EXPORT_TO, ".", "--force"],
    [*EXPORT_TO, "text.txt", "--force"],
    [*EXPORT_TO, "new", "--plugin", "absent.wav"],
    [*EXPORT_TO, "text.txt/new"],
    ["export", "loop.wav", "-o", "new"],
    ["bundle", "keygen", ""],
    ["bundle", "keygen", "text.txt/maker"],
    ["bundle", "sign", "bundle", "--key", "fifo.wav"],
    ["routes", "show", "zero.wav"],
]

ARGV = st.one_of(RUN, RUN, EXPORT, BUNDLE, ROUTES, MEASURE, PROFILE, PLAN, PROBE, SOUND)


@pytest.fixture(scope="module")
def files_of_all_kinds(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that each example gets a copy of, if their kind can be copied."""
    place = tmp_path_factory.mktemp("files")
    shutil.copytree(bundle_path, place / "bundle")
    write_export_checkpoint(place / "checkpoint")
    generate_keys(place / "maker")
    spoken = wav_bytes(encode(voice(0.4), PCM, 16))
    for name in ("question.wav", "answer.wav", NOT_UTF8, "unreadable.wav"):
        (place / name).write_bytes(spoken)
    (place / "silence.wav").write_bytes(wav_bytes(encode(silence(0.3), PCM, 16)))
    (place / "cut.wav").write_bytes(spoken[:-1000])
    (place / "empty.wav").touch()
    (place / "text.txt").write_text("no sound, no bundle, no key\n")
    return place


def _fill(place: Path, model: Path) -> None:
    """A fresh directory of all kinds of file."""
    shutil.copytree(model, place)
    (place / "folder").mkdir()
    (place / "folder" / "deep.wav").write_bytes(b"deep")
    (place / "closed").mkdir(mode=0)  # no obstacle for root
    (place / "unreadable.wav").chmod(0)
    (place / "link.wav").symlink_to("question.wav")
    (place / "dangling.wav").symlink_to("folder/behind.wav")
    (place / "loop.wav").symlink_to("loop.wav")
    os.link(place / "question.wav", place / "second_name.wav")
    os.mkfifo(place / "fifo.wav")
    for name, minor in (("null", 3), ("zero.wav", 5), ("full.wav", 7)):
        with contextlib.suppress(OSError):  # only root may make them
            make_node(place / name, minor)


def _tree(place: Path) -> dict[str, str]:
    """Every path with its kind and content."""
    return {str(path.relative_to(place)): _what(path) for path in sorted(place.rglob("*"))}


def _what(path: Path) -> str:
    found = path.lstat()
    kind = f"{found.st_mode:o} {found.st_rdev}"
    if stat.S_ISLNK(found.st_mode):
        return f"{kind} {path.readlink()}"
    if stat.S_ISREG(found.st_mode) and os.access(path, os.R_OK):
        return f"{kind} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return kind


def _named(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    return [value for flag, value in itertools.pairwise(argv) if flag in flags]


def _is_output(path: Path, outputs: list[Path], *, may_change: bool) -> bool:
    """Whether a path may change: it was named, or it is new or replaced by force below or above a
    named directory."""
    around = any(each in path.parents or path in each.parents for each in outputs)
    return path in outputs or (may_change and around)


def _outputs(argv: list[str], place: Path) -> list[Path]:
    """The places that the user named to be written, links followed."""
    named = _named(argv, _OUTPUT_FLAGS)
    if argv[:2] == ["bundle", "sign"]:
        named += [f"{word}/manifest.json.minisig" for word in argv[2:]]
    if argv[:2] == ["bundle", "keygen"]:
        named += [f"{word}{end}" for word in argv[2:] for end in (".key", ".pub")]
    places = []
    for name in named:
        path = Path(os.path.abspath(place / name))
        # Several answers are numbered; missing parent directories are made.
        numbered = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, 7)]
        places += [Path(os.path.realpath(each)) for each in (path, *numbered)]
    return places


def _check(argv: list[str], model: Path, root: Path) -> None:
    place = root / "here"
    _fill(place, model)
    before = _tree(place)
    shown, here = io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stderr(shown):
            code = main(argv)
        assert code in EXIT_CODES, argv
        assert "Traceback" not in shown.getvalue(), argv
        assert code or not shown.getvalue().startswith("deeptalk-edge: "), argv
        after, outputs = _tree(place), _outputs(argv, place)
        inputs = [Path(os.path.realpath(place / name)) for name in _named(argv, _INPUT_FLAGS)]
        is_replaced = code == 0 and "--force" in argv
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                may_change = is_replaced or name not in before
                assert _is_output(place / name, outputs, may_change=may_change), (argv, name)
                assert before.get(name, "100").startswith(("100", "40")), (argv, name)  # no node
                assert place / name not in inputs, (argv, name)
    finally:
        os.chdir(here)
        (place / "closed").chmod(0o700)
        shutil.rmtree(place)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Waits for a FIFO are short, and a hang ends the tests with a traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "FIFO_WAIT_S", 0.02)
        faulthandler.dump_traceback_later(120, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()


def _settings(num_examples: int) -> settings:
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("argv", KNOWN, ids=" ".join)
def test_flags_that_once_failed_end_well(
    argv: list[str], files_of_all_kinds: Path, tmp_path: Path
) -> None:
    with _bounded():
        _check(argv, files_of_all_kinds, tmp_path)


@_settings(60)
@given(argv=ARGV)
def test_any_flags_over_any_files_end_well(
    argv: list[str], files_of_all_kinds: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with _bounded():
        _check(argv, files_of_all_kinds, tmp_path_factory.mktemp("run"))


@pytest.mark.slow
@_settings(3000)
@given(argv=st.one_of(ARGV, TALK))
def test_many_flags_over_any_files_end_well(
    argv: list[str], files_of_all_kinds: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with _bounded():
        _check(argv, files_of_all_kinds, tmp_path_factory.mktemp("run"))
