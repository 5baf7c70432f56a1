"""Training loops; every one runs under accelerate."""
