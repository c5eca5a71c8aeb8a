"""deeptalk-edge: run the speech LLM DeepTalk on an edge device."""

__version__ = "0.1.0"
