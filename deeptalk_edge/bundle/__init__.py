"""The bundle's format: defined once, for those who write it and those who read it."""
