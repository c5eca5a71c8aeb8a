"""The tiny checkpoint's step answers a spoken question as the torch reference does, id by id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.generation import read_generation
from deeptalk_edge.export.graphs.decoder import export_embed_and_head
from deeptalk_edge.export.graphs.encoder import export_encoder
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.verify.golden import GraphRunner
from deeptalk_edge.export.verify.run_step import StepRunner
from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.model.prompt import AUDIO_TOKEN, Heard, Template
from deeptalk_edge.sound.wav import read_wav
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.generate import Mode, generate
from deeptalk_edge.training.model import DeepTalk
from tests.export.arenas import model_arenas
from tests.places import TINY

MAX_ROWS = 60


class GraphModel:
    """The exported graphs with the torch model's interface for `generate`."""

    def __init__(self, model: DeepTalk, place: Path, num_items: int) -> None:
        self.spec, self._parameters = model.spec, model.parameters
        decoder = self.spec.decoder
        records = RecordFormat(
            dtype="float32", width=decoder.width, ffn_width=decoder.expert_ffn_width
        )
        checkpoint = Checkpoint.open(TINY)
        export_encoder(checkpoint, place, is_fixed=True)
        export_embed_and_head(checkpoint, place)
        step = StepSettings(
            records=records, precision="float32", num_items=num_items, num_rows=None
        )
        export_step(checkpoint, place, step)
        rewrite_as_operators(place / "step.onnx", place / "native.onnx")
        self._encode, self._embed, self._head = (
            GraphRunner(place / f"{name}.onnx") for name in ("encoder", "embed", "head")
        )
        arenas = model_arenas(model, records)
        self._step = StepRunner(place / "native.onnx", arenas, capacity=400, num_items=num_items)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._parameters()

    def encode(self, mel: Tensor) -> Tensor:
        return torch.from_numpy(self._encode({"log_mel": mel.numpy()})["features"])[None]

    def __call__(
        self, rows: Tensor, features: Any = None, audio_mask: Any = None, *, cache: object
    ) -> Tensor:
        num_rows, width = rows.shape[1], self.spec.decoder.width
        feeds = {
            "rows": rows.numpy(),
            "features": np.zeros((num_rows, width), np.float32),
            "audio_mask": np.zeros(num_rows, np.bool_),
        }
        if features is not None:
            feeds |= {"features": features[0].numpy(), "audio_mask": audio_mask[0].numpy()}
        return torch.from_numpy(self._step.run(self._embed(feeds)["x"])["hidden"])

    def text_logits(self, hidden: Tensor) -> Tensor:
        return torch.from_numpy(self._head({"hidden": hidden.numpy()})["text_logits"])

    def code_logits(self, hidden: Tensor) -> Tensor:
        return torch.from_numpy(self._head({"hidden": hidden.numpy()})["code_logits"])


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
def test_a_float32_answer_equals_the_references_id_by_id(mode: Mode, tmp_path: Path) -> None:
    model = load_model(TINY).eval()
    graphs = GraphModel(model, tmp_path, 2 if mode == "batch-parallel" else 1)
    wav = sorted((TINY / "questions").glob("*.wav"))[0]
    pcm = read_wav(wav).pcm
    expected, found = (_answer(cast(DeepTalk, asked), pcm, mode) for asked in (model, graphs))
    assert len(expected.text_ids) > 2
    assert len(expected.frames) > 3
    assert found.text_ids == expected.text_ids
    np.testing.assert_array_equal(found.frames, expected.frames)


def _answer(model: DeepTalk, pcm: NDArray[np.float32], mode: Mode) -> Any:
    generation = read_generation(read_config(TINY))
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    audio_id = tokenizer.token_to_id(AUDIO_TOKEN)
    assert audio_id is not None
    template = Template(
        vocabulary=model.spec.vocabulary,
        audio_id=audio_id,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )
    prompt = template.opening(generation.system, Heard(num_frames=num_frames(len(pcm))))
    with torch.inference_mode():
        heard = model.encode(torch.from_numpy(log_mel(pcm, model.spec.encoder))[None])[0]
    features = torch.zeros(1, len(prompt.rows), model.spec.decoder.width)
    mask = torch.from_numpy(prompt.audio_mask)
    features[0, mask] = heard[: int(mask.sum())]
    (answer,) = generate(
        model,
        prompt.rows[None],
        features,
        mask[None],
        speaker=generation.speaker,
        mode=mode,
        max_rows=MAX_ROWS,
    )
    return answer
