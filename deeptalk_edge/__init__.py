"""deeptalk-edge: run the speech LLM DeepTalk on an edge device.

from deeptalk_edge import Bundle, Conversation
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.runtime.conversation import Conversation

__all__ = ["Bundle", "Conversation"]
__version__ = "0.1.0"

# Nothing calls home. Recent versions of ONNX Runtime keep a device id under the home directory and
# send events, unless this is set before its first import; its own disable_telemetry_events()
# comes too late. Every module of ours is imported after this one. A user's own value is kept.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Load the runtime when it is first used: the package itself imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.runtime.conversation import Conversation

    return {"Bundle": Bundle, "Conversation": Conversation}[name]
