"""DiTFastAttnV2 as a search: per head, a program for each layer and step."""
