"""Warmups from measured critical rates: the initial learning rate and the persistent catapult."""
