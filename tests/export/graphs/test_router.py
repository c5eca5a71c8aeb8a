"""The weights of a token's experts, calculated by hand from DeepSeek-V2's `MoEGate`.

    shares = softmax(logits), the greatest k of them
    k > 1 and norm_topk_prob    divided by their sum; routed_scaling_factor is not used
    else                        times routed_scaling_factor

The reference, the graphs and the kernels could share a mistake, so these figures are independent of
them. Other tests run the specs of tests/specs.py through each and show that all agree.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.export.graphs.builder import FLOAT, INT64, Graph
from deeptalk_edge.export.graphs.layers import choose_experts
from deeptalk_edge.export.verify.golden import GraphRunner
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.training.experts import Router
from tests.specs import DECODER

SHARES = [0.1, 0.5, 0.05, 0.3, 0.05]
LOGITS = np.log(np.array([[SHARES]], np.float32))

BY_HAND = pytest.mark.parametrize(
    ("top_k", "norm", "scale", "weights"),
    [
        (2, False, 1.0, [0.5, 0.3]),
        (2, False, 2.5, [1.25, 0.75]),
        (2, True, 1.0, [0.625, 0.375]),
        (2, True, 2.5, [0.625, 0.375]),
        (1, False, 1.0, [0.5]),
        (1, False, 2.5, [1.25]),
        (1, True, 1.0, [0.5]),
        (1, True, 2.5, [1.25]),
    ],
)


def spec_of(top_k: int, norm: bool, scale: float) -> DecoderSpec:
    spec = replace(DECODER, top_k=top_k, normalise_top_k=norm, routed_scale=scale)
    assert spec.num_experts == len(SHARES)
    return spec


def assert_chosen(found: NDArray[np.float32], ids: NDArray[np.int64], weights: list[float]) -> None:
    best_first = np.argsort(-found.ravel())
    np.testing.assert_array_equal(ids.ravel()[best_first], [1, 3][: len(weights)])
    np.testing.assert_allclose(found.ravel()[best_first], weights, rtol=1e-5)


@BY_HAND
def test_the_model_that_trains_weights_experts_as_deepseek_does(
    top_k: int, norm: bool, scale: float, weights: list[float]
) -> None:
    spec = spec_of(top_k, norm, scale)
    router = Router(replace(spec, width=len(SHARES)))
    router.weight.data = torch.eye(len(SHARES))
    _, found, ids = router(torch.from_numpy(LOGITS))
    assert_chosen(found.detach().numpy(), ids.numpy(), weights)


@BY_HAND
def test_graphs_weight_experts_as_deepseek_does(
    top_k: int, norm: bool, scale: float, weights: list[float], tmp_path: Path
) -> None:
    with Graph(tmp_path, "router") as graph:
        logits = graph.input("logits", FLOAT, (1, 1, len(SHARES)))
        chosen, ids = choose_experts(graph, logits, spec_of(top_k, norm, scale))
        graph.output(chosen, "weights", (1, 1, top_k))
        graph.output(ids, "ids", (1, 1, top_k), data_type=INT64)
    found = GraphRunner(tmp_path / "router.onnx")({"logits": LOGITS})
    assert_chosen(found["weights"], found["ids"], weights)
