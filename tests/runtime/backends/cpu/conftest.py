"""CPU bundles of random weights and an engine on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from tests.native.cpu import built
from tests.runtime.backends.cpu.random_bundles import WIDE, random_bundles
from tests.runtime.backends.cpu.resident import Resident


@pytest.fixture(scope="session")
def library() -> CpuLibrary:
    return built.library()


@pytest.fixture(scope="session", params=["int8", "int4"])
def bundles(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """A float32 bundle and a CPU bundle of the same weights. Shared: never write to them."""
    return random_bundles(WIDE, tmp_path_factory.mktemp("native"), request.param)


@pytest.fixture(scope="session")
def bundle(bundles: tuple[Bundle, Bundle]) -> Bundle:
    return bundles[1]


@pytest.fixture
def engine(bundle: Bundle, library: CpuLibrary) -> Iterator[CpuEngine]:
    engine = CpuEngine(
        bundle, context_rows=32, library=library, open_experts=lambda: Resident(bundle)
    )
    yield engine
    engine.close()
