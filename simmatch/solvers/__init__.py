"""From drives and M to activities: gradient, block and coordinate solvers, and the certified bound of λmax(M)."""
