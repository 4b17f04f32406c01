"""Schedules refined from the gradient norms of a run."""
