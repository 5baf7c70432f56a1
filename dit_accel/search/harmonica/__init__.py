"""HarmoniCa (arXiv:2410.01723) as a search: a trained table of sublayers and steps becomes a recipe."""
