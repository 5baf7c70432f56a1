"""The plan search: what every head does at every step, by its error in the sample and its seconds."""
