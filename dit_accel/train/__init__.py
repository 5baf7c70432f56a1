"""Training loops; every one runs under accelerate, through `loop.train`."""
