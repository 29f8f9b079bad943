"""Solvers of the dynamics: gradient, block and coordinate methods, and the certified bound of λmax(M)."""
