"""The runtime's bundle with random weights, for engines that page."""

from tests.runtime.conftest import bundle, bundle_path, own_copy

__all__ = ["bundle", "bundle_path", "own_copy"]
