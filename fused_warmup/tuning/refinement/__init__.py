"""Refine learning-rate schedules from the gradient norms of a previous run."""
