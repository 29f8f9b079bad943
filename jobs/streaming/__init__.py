"""`python -m jobs.stream`: learning from records that keep arriving."""
