"""HarmoniCa's router: which sublayer computes at which step, learned on a frozen model's own trajectories.

Source: Huang et al. 2024, arXiv:2410.01723 (ICML 2025).
"""
