"""Sound: files, voice detection, endpointing and the codec."""
