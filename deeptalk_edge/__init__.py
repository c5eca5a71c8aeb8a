"""deeptalk-edge: run the speech LLM DeepTalk on an edge device.

from deeptalk_edge import Bundle, Conversation
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deeptalk_edge.runtime.bundle import Bundle
    from deeptalk_edge.runtime.conversation import Conversation

__all__ = ["Bundle", "Conversation"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the runtime when it is first asked for: the package itself imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deeptalk_edge.runtime.bundle import Bundle
    from deeptalk_edge.runtime.conversation import Conversation

    return {"Bundle": Bundle, "Conversation": Conversation}[name]
