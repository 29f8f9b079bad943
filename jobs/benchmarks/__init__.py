"""The measurements behind `python -m jobs.benchmark`; see `jobs.benchmarks.report` for what they print where."""
