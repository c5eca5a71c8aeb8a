"""Before any test module: ONNX Runtime is not to call home from the tests, either."""

import deeptalk_edge  # noqa: F401
