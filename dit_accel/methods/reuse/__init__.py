"""Methods that replace a computation by a stored output: across steps or across branches."""
