"""Warmups that are measured: the initial rate and the persistent catapult."""
