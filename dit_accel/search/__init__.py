"""Searches that make recipes: rules, sensitivity, cost and the solver; scripts and the CLI call them."""
