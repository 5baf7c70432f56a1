"""Whole steps and spans of blocks: which of them are computed."""
