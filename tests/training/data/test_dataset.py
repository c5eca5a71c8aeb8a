"""Batches depend only on (seed, step), and an epoch has every sample as often as its source
says."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.training.data.dataset import (
    Batches,
    Entry,
    Reader,
    build_index,
    evaluation_plans,
    held_out,
    load_batch,
    spread,
)
from deeptalk_edge.training.items import NO_FRAME, Batch
from deeptalk_edge.training.stages.recipe import Source, TaskName
from tests.training.toys import write_toy_checkpoint, write_toy_data

COUNT = 13


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    place = tmp_path_factory.mktemp("toy")
    checkpoint = write_toy_checkpoint(place / "checkpoint")
    data = write_toy_data(place / "data", COUNT)
    tasks: tuple[tuple[TaskName, int], ...] = (("AQACONVA", 1), ("TQA", 2))
    sources = tuple(Source(path=str(data), task=task, repeat=repeat) for task, repeat in tasks)
    return Reader(
        checkpoint=checkpoint,
        spec=read_model_spec(checkpoint),
        sources=sources,
        system="you are a toy",
        max_rows=1000,
    )


def _batches(reader: Reader, seed: int = 0) -> Batches:
    entries = build_index(reader).entries
    return Batches(reader, entries, batch_size=4, accumulation=2, seed=seed)


def test_a_step_depends_only_on_its_number_and_the_seed(reader: Reader) -> None:
    batches = _batches(reader)
    later = [batches.plans_at(step) for step in (9, 3, 0)]
    again = [_batches(reader).plans_at(step) for step in (9, 3, 0)]
    assert later == again
    assert pickle.loads(pickle.dumps(batches)).plans_at(3) == later[1]
    assert _batches(reader, seed=1).plans_at(3) != later[1]


def test_an_epoch_has_every_sample_as_often_as_its_source_says(reader: Reader) -> None:
    batches = _batches(reader)
    num_batches = round(batches.steps_per_epoch * 2)
    plans = [plan for step in range(num_batches) for plan in batches.plans_at(step)]
    counts = Counter(entry for plan in plans[:num_batches] for entry in plan.entries)
    assert {counts[e] for e in counts if e.source == 0} == {1}
    assert {counts[e] for e in counts if e.source == 1} == {2}
    assert sum(counts.values()) == 3 * COUNT


def test_samples_of_like_length_share_a_batch(reader: Reader) -> None:
    batches = _batches(reader)
    plans = [plan for step in range(5) for plan in batches.plans_at(step)][:10]
    spreads = [
        max(e.num_rows for e in p.entries) - min(e.num_rows for e in p.entries) for p in plans
    ]
    lengths = [e.num_rows for p in plans for e in p.entries]
    assert sum(spreads) / len(spreads) < (max(lengths) - min(lengths)) / 3


def test_a_batch_has_the_features_of_its_recordings(reader: Reader) -> None:
    """Frame f of utterance u is row u * F + f of the feature table."""
    (plan, *_) = evaluation_plans([e for e in build_index(reader).entries if e.source == 0], 4)
    batch = load_batch(reader, plan)
    assert isinstance(batch, Batch)
    assert batch.log_mel is not None
    window = reader.spec.encoder.max_frames
    assert batch.log_mel.shape == (4, 80, 2 * window)
    for i, frames in enumerate(batch.frames):
        heard = frames[frames != NO_FRAME]
        assert heard[0] == i * window
        assert bool((heard.diff() == 1).all())
    assert batch.live.sum(dim=1).tolist() == [entry.num_rows for entry in plan.entries]
    assert all(
        name.endswith(f":{e.line}") for name, e in zip(batch.names, plan.entries, strict=True)
    )
    assert torch.isfinite(batch.log_mel).all()


def test_training_is_fed_wrong_codes_and_asked_for_the_true_ones(reader: Reader) -> None:
    noisy = replace(reader, corrupted_codes=0.5)
    plan = _batches(reader).plans_at(0)[0]
    plan = replace(plan, entries=tuple(e for e in build_index(reader).entries if e.source == 0))
    true, fed, again = (load_batch(one, plan) for one in (reader, noisy, noisy))
    assert isinstance(true, Batch)
    assert isinstance(fed, Batch)
    assert isinstance(again, Batch)
    assert torch.equal(fed.targets, true.targets)
    assert torch.equal(fed.rows, again.rows)
    vocabulary = reader.spec.vocabulary
    bases = torch.tensor([vocabulary.codebook_base(i) for i in range(vocabulary.num_codebooks)])
    is_code = true.rows[..., :-1] - bases < vocabulary.codebook_size
    differs = fed.rows != true.rows
    assert 0.1 < float(differs[..., :-1][is_code].float().mean()) < 0.4
    assert not bool(differs[..., :-1][~is_code].any())
    assert not bool(differs[..., -1].any())
    judged = load_batch(noisy, replace(plan, seed=None))
    assert isinstance(judged, Batch)
    assert torch.equal(judged.rows, true.rows)


def test_held_out_samples_are_never_trained_on(reader: Reader) -> None:
    entries = build_index(reader).entries
    kept, out = held_out(entries, 0.4)
    assert sorted(kept + out, key=_key) == sorted(entries, key=_key)
    assert 3 < len(out) < 20
    assert held_out(entries, 0.0) == (list(entries), [])


def _key(entry: Entry) -> tuple[int, int]:
    return entry.source, entry.line


def test_a_recording_that_goes_away_is_named(reader: Reader, tmp_path: Path) -> None:
    data = write_toy_data(tmp_path / "data", 2)
    source = Source(path=str(data), task="AQACONVA")
    moved = Reader(
        checkpoint=reader.checkpoint,
        spec=reader.spec,
        sources=(source,),
        system="",
        max_rows=1000,
    )
    (plan,) = evaluation_plans(build_index(moved).entries, 4)
    (tmp_path / "data" / "q1.wav").unlink()
    with pytest.raises(ArtifactError, match=r"data\.jsonl:2: .*q1\.wav"):
        load_batch(moved, plan)


def test_no_data_is_refused(reader: Reader) -> None:
    with pytest.raises(SettingsError, match="no sample is left"):
        Batches(reader, [], batch_size=4, accumulation=1, seed=0)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "a"), (2, "ad"), (4, "abdf"), (7, "abcdefg"), (99, "abcdefg")]
)
def test_some_samples_are_spread_over_all(count: int, expected: str) -> None:
    """A fixed stride would find 4 of 7 where 6 are wanted."""
    assert "".join(spread("abcdefg", count)) == expected
