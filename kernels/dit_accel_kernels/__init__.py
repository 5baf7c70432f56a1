"""Kernels of dit_accel: one folder per op, its meaning in plain PyTorch and the backends beside it."""

from dit_accel_kernels.block_attention import Window, block_attention, window_mask

__all__ = ["Window", "block_attention", "window_mask"]
