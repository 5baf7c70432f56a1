"""Kernels of dit_accel: one folder per op, `reference.py` beside every backend is the law."""
