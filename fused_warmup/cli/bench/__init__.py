"""The command ``fused-warmup bench``."""
