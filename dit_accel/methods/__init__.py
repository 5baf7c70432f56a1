"""Approximations: frozen dataclasses whose fields are the parameters a recipe may give."""
