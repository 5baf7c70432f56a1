"""Methods that replace one attention call, head by head."""
