"""The honest bench: dense, the same sampler with fewer steps, peers and our recipes, taking turns."""
