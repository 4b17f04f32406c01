"""The commands ``fused-warmup train`` and ``report``."""
