"""The runtime's bundle with random weights serves here, too."""

from tests.runtime.conftest import _one_torch_thread, bundle, bundle_path

__all__ = ["_one_torch_thread", "bundle", "bundle_path"]
