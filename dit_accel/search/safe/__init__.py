"""Recipes by rule, for models that nobody has measured here."""
