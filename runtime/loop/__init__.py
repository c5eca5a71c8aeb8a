"""The full-duplex loop: listen, think, speak, be interrupted."""
