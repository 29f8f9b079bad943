"""The comparison that `python -m jobs.evaluate` prints: learners of features, networks, label budgets, shifted data."""
