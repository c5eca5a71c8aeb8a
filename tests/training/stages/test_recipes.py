"""Every recipe at toy size: the trained tensors are those of the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.data.dataset import BatchPlan, load_batch
from deeptalk_edge.training.experts import MixtureOfExperts, Routing
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.journal import read_journal
from deeptalk_edge.training.stages.objective import encode_batch, run
from deeptalk_edge.training.stages.prepare import Prepared, prepare
from deeptalk_edge.training.stages.recipe import RECIPES, read_recipe
from deeptalk_edge.training.stages.run import Objective, run_recipe
from deeptalk_edge.training.stages.table import RULES, part_of, trainable
from tests.training.toys import (
    parameters_of,
    recipe_changes,
    write_toy_checkpoint,
    write_toy_data,
    write_toy_pairs,
)

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))

# By hand, from the official scripts: the tensors that each stage trains. (encoder, projector,
# embedding, dense layers, norms, attention, router, audio, text, shared)
OFFICIAL = {
    "align": (0, 1, 1, 0, 0, 0, 0, 0, 0, 0),
    "audio_experts": (0, 0, 1, 1, 1, 0, 1, 1, 0, 1),
    "text_experts": (0, 0, 1, 1, 1, 0, 1, 0, 1, 1),
    "joint": (0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    "preference": (0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    "puremoe": (0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "moextend": (0, 0, 1, 1, 1, 0, 1, 1, 0, 1),
    "random_split": (0, 0, 1, 1, 1, 0, 1, 1, 0, 1),
    "distil": (0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
    "finetune": (0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
}
PARTS = (
    "encoder",
    "projector",
    "embedding",
    "dense",
    "norms",
    "attention",
    "router",
    "audio_experts",
    "text_experts",
    "shared_experts",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_pairs(tmp_path_factory.mktemp("pairs"))


def _changes(name: str, checkpoint: Path, data: Path, pairs: Path, output: Path) -> list[str]:
    changes = recipe_changes(checkpoint, pairs if name == "preference" else data, output)
    return [*changes, "num_audio_experts=2"] if name in ("moextend", "random_split") else changes


@pytest.fixture(scope="module")
def prepared(checkpoint: Path, data: Path, pairs: Path) -> dict[str, Prepared]:
    return {
        name: prepare(read_recipe(name, _changes(name, checkpoint, data, pairs, Path("unused"))))
        for name in NAMES
    }


def test_recipes_and_rows_of_the_table_are_the_same() -> None:
    assert set(NAMES) == set(RULES) == set(OFFICIAL)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_official_scripts(name: str) -> None:
    expected = {part for part, moves in zip(PARTS, OFFICIAL[name], strict=True) if moves}
    assert RULES[name].trains == expected  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_with_a_gradient_are_those_of_the_table(
    name: str, prepared: dict[str, Prepared]
) -> None:
    """On data that reaches every expert; a barred expert's row of the router has no gradient."""
    run_of = prepared[name]
    model, decoder = run_of.model, run_of.model.spec.decoder
    objective = Objective(model, run_of.recipe, run_of.reference, bfloat16=False)
    if name == "preference":  # equal models have a margin of 0 and still a gradient
        assert run_of.reference is not None
    _descend(run_of, objective)
    moved = {
        parameter
        for parameter, p in model.named_parameters()
        if p.grad is not None and bool((p.grad != 0).any())
    }
    table = {
        parameter
        for parameter, _ in model.named_parameters()
        if part_of(parameter, decoder, run_of.split) in run_of.recipe.rule.trains
    }
    assert moved == table == set(trainable(model))
    for layer in decoder.moe_layers:
        mixture = model.model.layers[layer].mlp
        assert isinstance(mixture, MixtureOfExperts)
        if mixture.gate.weight.grad is not None and bool(mixture.gate.barred.any()):
            rows = (mixture.gate.weight.grad != 0).any(dim=1)
            assert torch.equal(rows, ~mixture.gate.barred)


def _descend(run_of: Prepared, objective: Objective) -> None:
    """All of the data, with rows for every expert that is not barred."""
    for entry in run_of.train_entries:
        batch = load_batch(run_of.reader, BatchPlan(entries=(entry,), seed=entry.line))
        torch.autograd.backward(torch.stack(list(objective(batch).values())).sum())


@pytest.mark.parametrize(("name", "side"), [("audio_experts", 0), ("text_experts", 1)])
def test_a_barred_expert_gets_no_mass(name: str, side: int, prepared: dict[str, Prepared]) -> None:
    run_of = prepared[name]
    batch = load_batch(run_of.reader, run_of.evaluation[1][0]) if run_of.evaluation[1] else None
    batch = batch or load_batch(run_of.reader, _plan_of_all(run_of))
    assert isinstance(batch, Batch)
    routing: list[Routing] = []
    run(run_of.model, batch, encode_batch(run_of.model, batch), routing)
    assert run_of.split is not None
    for layer, audio in zip(routing, run_of.split, strict=True):
        everyone = set(range(run_of.model.spec.decoder.num_experts))
        barred = sorted(everyone - set(audio)) if side == 0 else sorted(audio)
        assert (layer.probabilities[..., barred] == 0).all()
        assert not torch.isin(layer.expert_ids, torch.tensor(barred)).any()


def _plan_of_all(run_of: Prepared) -> BatchPlan:
    return BatchPlan(entries=tuple(run_of.train_entries), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_changes_only_the_trained_tensors(
    name: str, checkpoint: Path, data: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(name, _changes(name, checkpoint, data, pairs, tmp_path / "run"))
    recipe = replace(recipe, saving=replace(recipe.saving, dtype="float32", keep=1))
    final = run_recipe(recipe, resume=False)
    before, after = parameters_of(checkpoint), parameters_of(final)
    split = prepare(recipe).split
    from deeptalk_edge.checkpoint.config import read_model_spec

    decoder = read_model_spec(final).decoder
    for parameter, tensor in after.items():
        if parameter not in before or before[parameter].shape != tensor.shape:
            continue  # moextend adds tensors
        moves = part_of(parameter, decoder, split) in recipe.rule.trains
        if not moves:
            assert torch.equal(before[parameter], tensor), parameter
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "step-000006" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "step-000004").exists()


def test_remembered_recordings_give_the_same_losses(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Except for the half precision of stored features."""
    losses = []
    for remember in ("false", "true"):
        output = tmp_path / remember
        changes = _changes("joint", checkpoint, data, data, output)
        more = [f"data.remember={remember}", "optimiser.num_steps=1", "data.held_out=0.2"]
        run_recipe(read_recipe("joint", [*changes, *more]), resume=False)
        (step,) = (e for e in read_journal(output / "journal.jsonl") if e["kind"] == "step")
        losses.append(step["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0]


def test_gradients_are_the_same_when_layers_are_computed_again(
    prepared: dict[str, Prepared],
) -> None:
    run_of, gradients = prepared["joint"], []
    objective = Objective(run_of.model, run_of.recipe, None, bfloat16=False)
    batch = load_batch(run_of.reader, _plan_of_all(run_of))
    for again in (False, True):
        run_of.model.checkpoints_gradients = again
        run_of.model.zero_grad()
        torch.autograd.backward(torch.stack(list(objective(batch).values())).sum())
        gradients.append([p.grad.clone() for p in run_of.model.parameters() if p.grad is not None])
    run_of.model.checkpoints_gradients = False
    for whole, recomputed in zip(*gradients, strict=True):
        assert torch.equal(whole, recomputed)


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"optimiser\.speed: no such field"):
        read_recipe("joint", ["optimiser.speed=2"])


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="audio_experts, distil"):
        read_recipe("nothing")


@pytest.mark.parametrize("mode", ["proper", pytest.param("released", marks=pytest.mark.slow)])
def test_dpo_raises_the_margin_between_the_answers(
    mode: str, checkpoint: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    changes = [
        *_changes("preference", checkpoint, pairs, pairs, output),
        f'data.evaluate=[{{path = "{pairs}", task = "RQACONVA"}}]',
        f"preference.mode={mode}",
        "optimiser.num_steps=16",
        "optimiser.learning_rate=2e-3",
        "saving.every=16",
        "saving.evaluate_every=8",
    ]
    run_recipe(read_recipe("preference", changes), resume=False)
    judged = [e for e in read_journal(output / "journal.jsonl") if e["kind"] == "evaluation"]
    margins = [entry["margin"] for entry in judged]
    assert 0 < margins[0] < margins[1]
