"""How the owners of one layer's channels share its work: rows, columns, and what they exchange."""
