"""Thin entry points, each run as `python -m jobs.NAME`: parse, build, run."""
