"""VORTA's routers: which kind of attention each head takes at each noise level, learned on a frozen model.

Source: Sun et al. 2025, arXiv:2505.18809.
"""
