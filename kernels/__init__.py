"""Triton kernels, installed as unicode_fast.kernels; imported only when a Triton backend is chosen."""
