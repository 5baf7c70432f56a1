"""The toys: tiny pipelines in real diffusers classes, trained on scenes that code draws."""
