"""Sharding of one layer over several owners of its channels: by rows or by columns, and their exchanges."""
