"""An export writes a complete bundle or leaves no files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, DoesNotFit, EdgeError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.staging import JOURNAL
from tests.disks import small_disk
from tests.export.checkpoints import check_graphs, write_checkpoint
from tests.places import ROOT
from tests.specs import PLAIN


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bundle") / "checkpoint").place


def _copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def test_the_runtime_opens_and_verifies_an_exported_bundle(
    checkpoint: Path, tmp_path: Path
) -> None:
    manifest = export_bundle(checkpoint, tmp_path / "bundle", ExportSettings())
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest == manifest
    assert bundle.manifest.model == PLAIN
    assert bundle.verify() == sum(entry.bytes for entry in manifest.files.values())
    names = {path.name for path in bundle.path.iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert check_graphs(bundle.path) == 8


def test_one_checkpoint_gives_one_bundle_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (export_bundle(checkpoint, tmp_path / name, ExportSettings()) for name in "ab")
    assert first == second
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    with zipfile.ZipFile(tmp_path / "a" / "golden.npz") as golden:
        assert {entry.date_time[0] for entry in golden.infolist()} == {1980}


def test_every_step_is_announced_in_order(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_bundle(
        checkpoint,
        tmp_path / "bundle",
        ExportSettings(),
        lambda step, done, total: seen.append((done, total)),
    )
    total = seen[0][1]
    assert seen == [(done, total) for done in range(total)]


def test_a_bundle_with_a_noise_tape_says_its_rates(checkpoint: Path, tmp_path: Path) -> None:
    settings = ExportSettings(codec_noise="tape")
    entry = export_bundle(checkpoint, tmp_path / "bundle", settings).codec
    assert (entry.noise, entry.noise_rates) == ("tape", (32, 256, 1024, 2048))


def test_snac_is_read_from_the_torch_file_in_which_it_is_published(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain = export_bundle(checkpoint, tmp_path / "plain", ExportSettings())
    published = tmp_path / "snac"
    published.mkdir()
    shutil.copy(checkpoint / "snac" / "config.json", published)
    torch.save(
        load_file(checkpoint / "snac" / "model.safetensors"), published / "pytorch_model.bin"
    )
    settings = ExportSettings(snac=published)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", settings)
    assert manifest.files["codec.bin"] == plain.files["codec.bin"]


def test_a_bundle_is_replaced_only_with_force(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    export_bundle(checkpoint, place, ExportSettings())
    (place / "manifest.json.minisig").touch()  # a signature is part of a bundle
    with pytest.raises(ArtifactError, match="--force"):
        export_bundle(checkpoint, place, ExportSettings())
    export_bundle(checkpoint, place, ExportSettings(replace=True, codec_noise="tape"))
    assert Bundle.open(place).manifest.codec.noise == "tape"
    assert not (place / "manifest.json.minisig").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_checkpoint_without_a_tensor_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    broken = _copy(checkpoint, tmp_path)
    _edit_weights(broken / "model.safetensors", remove="model.norm.weight")
    _assert_leaves_nothing(broken, tmp_path / "out", match=r"model\.norm\.weight")


def test_a_checkpoint_with_a_misshapen_tensor_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    broken = _copy(checkpoint, tmp_path)
    _edit_weights(broken / "model.safetensors", halve="model.norm.weight")
    _assert_leaves_nothing(broken, tmp_path / "out", match=r"model\.norm\.weight")


def test_a_codec_without_a_tensor_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    broken = _copy(checkpoint, tmp_path)
    _edit_weights(broken / "snac" / "model.safetensors", remove="decoder.model.1.bias")
    _assert_leaves_nothing(broken, tmp_path / "out", match=r"decoder\.model\.1\.bias")


def test_a_codec_of_other_codes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = _copy(checkpoint, tmp_path)
    config = json.loads((broken / "snac" / "config.json").read_text())
    config["codebook_size"] += 1
    (broken / "snac" / "config.json").write_text(json.dumps(config))
    _assert_leaves_nothing(broken, tmp_path / "out", match="7 codes of 32 per frame")


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = _copy(checkpoint, tmp_path)
    (broken / "tokenizer.json").unlink()
    _assert_leaves_nothing(broken, tmp_path / "out", match=r"tokenizer\.json")


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        with pytest.raises(DoesNotFit, match="No space left on device"):
            export_bundle(checkpoint, disk / "bundle", ExportSettings())
        assert list(disk.iterdir()) == []


# Killed as this step begins; the number is how often it has begun before.
KILLS = [("encoder", 0), ("decoder", 0), ("experts", 2), ("golden", 0), ("manifest", 0)]


@pytest.mark.parametrize(("step", "after"), KILLS)
def test_a_killed_export_leaves_no_bundle_and_can_be_continued_to_the_same_one(
    step: str, after: int, checkpoint: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out" / "bundle"
    _kill(checkpoint, place, step, after)
    assert not place.exists()
    (left,) = place.parent.iterdir()
    with pytest.raises(EdgeError):
        Bundle.open(left)
    finished = _finished(left)
    manifest = export_bundle(checkpoint, place, ExportSettings())
    assert manifest == export_bundle(checkpoint, tmp_path / "whole", ExportSettings())
    assert _content(place) == _content(tmp_path / "whole")
    assert {name: (place / name).stat().st_mtime_ns for name in finished} == finished
    assert [path.name for path in place.parent.iterdir()] == ["bundle"]
    assert bool(finished) is (step != "encoder")


def test_other_inputs_start_an_export_over(checkpoint: Path, tmp_path: Path) -> None:
    own, place = _copy(checkpoint, tmp_path), tmp_path / "out" / "bundle"
    _kill(own, place, "golden")
    _edit_weights(own / "model.safetensors", double="model.norm.weight")
    manifest = export_bundle(own, place, ExportSettings())
    assert manifest == export_bundle(own, tmp_path / "whole", ExportSettings())


@pytest.mark.parametrize("name", ["encoder.bin", "experts.bin"])
def test_a_file_that_was_damaged_meanwhile_is_written_again(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out" / "bundle"
    _kill(checkpoint, place, "experts", 2)
    with (place.with_name(".bundle.partial") / name).open("r+b") as file:
        file.write(b"xyz")
    manifest = export_bundle(checkpoint, place, ExportSettings())
    assert manifest == export_bundle(checkpoint, tmp_path / "whole", ExportSettings())
    Bundle.open(place).verify()


def test_an_export_that_was_interrupted_keeps_what_is_done(
    checkpoint: Path, tmp_path: Path
) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if step == "golden":
            raise KeyboardInterrupt

    place = tmp_path / "out" / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, place, ExportSettings(), interrupt)
    assert "experts.bin" in _finished(place.with_name(".bundle.partial"))


def test_two_exports_to_one_place_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"

    def begin_another(step: str, done: int, total: int) -> None:
        if step == "experts":
            with pytest.raises(ArtifactError, match="another export is writing it"):
                export_bundle(checkpoint, place, ExportSettings())

    export_bundle(checkpoint, place, ExportSettings(), begin_another)
    Bundle.open(place).verify()


def _kill(checkpoint: Path, place: Path, step: str, after: int = 0) -> None:
    """Begin an export in a child that ends by SIGKILL."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from deeptalk_edge.export.bundle import ExportSettings, export_bundle\n"
        "seen = []\n"
        "def die(step, done, total):\n"
        f"    if (step, seen.count(step)) == {(step, after)}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    seen.append(step)\n"
        "export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), ExportSettings(), die)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(place)], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL


def _finished(staging: Path) -> dict[str, int]:
    """The finished files of an export that ended early, and when they were written."""
    journal = staging / JOURNAL
    steps = json.loads(journal.read_text())["done"].values() if journal.is_file() else ()
    return {name: (staging / name).stat().st_mtime_ns for step in steps for name in step["files"]}


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _edit_weights(path: Path, *, remove: str = "", halve: str = "", double: str = "") -> None:
    tensors = load_file(path)
    if double:
        tensors[double] = 2 * tensors[double]
    if remove:
        del tensors[remove]
    if halve:
        tensors[halve] = tensors[halve][::2].contiguous()
    save_file(tensors, path)


def _assert_leaves_nothing(checkpoint: Path, parent: Path, *, match: str) -> None:
    parent.mkdir()
    with pytest.raises(ArtifactError, match=match):
        export_bundle(checkpoint, parent / "bundle", ExportSettings())
    assert list(parent.iterdir()) == []
