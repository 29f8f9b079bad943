"""Data that never ends, measured: `python -m jobs.benchmark stream`. Test, then learn; every row with one readout."""
