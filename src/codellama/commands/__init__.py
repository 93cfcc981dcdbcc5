"""The commands: one function each, whose signature is its help."""
