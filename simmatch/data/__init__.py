"""Data sets: where images come from, how they are read, in which order they are visited."""
