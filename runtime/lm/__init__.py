"""The language model: its cache, its engine interface, sampling and text pieces."""
