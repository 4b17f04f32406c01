"""``python -m fused_warmup``: the same as the command ``fused-warmup``."""

from .cli import main

if __name__ == "__main__":
    main()
