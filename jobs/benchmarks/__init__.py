"""The measurements behind `python -m jobs.benchmark`; see `jobs.reporting` for what they print where."""
