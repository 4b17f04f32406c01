"""The truth: every rule and schedule in plain PyTorch, written to be read beside the papers."""
