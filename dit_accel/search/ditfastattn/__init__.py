"""DiTFastAttn as a search: per layer and step, greedy along one generation."""
