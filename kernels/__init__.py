"""Triton kernels, installed as `unicode_fast.kernels`: one operator per file, kernel and launcher in this order."""
