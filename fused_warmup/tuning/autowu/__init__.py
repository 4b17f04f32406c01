"""Automatic warmup, which ends where the losses have passed their minimum."""
