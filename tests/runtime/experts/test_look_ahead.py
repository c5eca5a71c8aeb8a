"""A look-ahead applies the next layer's router to this layer's normalised input."""

from __future__ import annotations

import numpy as np

from deeptalk_edge.runtime.experts.look_ahead import LookAhead, folded_gates

WIDTH, NUM_EXPERTS, TOP_K = 6, 5, 2
random = np.random.default_rng(1)


def test_the_prediction_is_the_next_routers_choice_for_the_same_stream() -> None:
    gates = {i: random.normal(size=(NUM_EXPERTS, WIDTH)).astype(np.float32) for i in (1, 2, 3)}
    norms = {i: random.uniform(0.5, 2, WIDTH).astype(np.float32) for i in (1, 2, 3)}
    look_ahead = LookAhead(folded_gates(gates, norms), TOP_K)
    stream = random.normal(size=(7, WIDTH)).astype(np.float32)
    found = look_ahead.predict(2, stream * norms[2])
    assert found is not None
    scores = (stream * norms[3]) @ gates[3].T
    expected = np.argsort(-scores, axis=1)[:, :TOP_K]
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))
    assert look_ahead.predict(3, stream) is None
