"""The Triton backend, imported only when it is chosen."""
