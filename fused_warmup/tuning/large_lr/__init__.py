"""Where large learning rates lead: regimes, fine-tuning, and the geometry of solutions."""
