"""Data sets: file formats, sources, the order in which images are used, and their way to the device."""
