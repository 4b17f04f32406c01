"""Sharded parameters, and means over processes."""
