"""dit_accel: several times faster diffusers transformer pipelines, with the cost stated."""
