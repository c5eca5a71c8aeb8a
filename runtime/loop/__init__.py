"""The full-duplex voice loop: it listens, answers, and can be interrupted."""
