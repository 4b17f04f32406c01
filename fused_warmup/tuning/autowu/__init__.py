"""Automatic warmup: detects the end of warmup from the losses."""
