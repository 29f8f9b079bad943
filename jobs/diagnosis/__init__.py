"""What a machine, a node or a cluster lacks for a run: facts, what they mean, and lines that say so."""
