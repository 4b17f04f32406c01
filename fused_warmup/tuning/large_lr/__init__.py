"""Large learning rates: regimes, pre-training with fine-tuning, and the geometry of solutions."""
