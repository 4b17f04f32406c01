"""The step as Triton kernels. Imported only when the backend is chosen."""
