"""Checkpoints: every rank writes its rows, a manifest written last commits them."""
