"""Routed experts: where their weights are while a token needs them."""
