"""Data sets: file formats, sources, and the order in which images are used."""
