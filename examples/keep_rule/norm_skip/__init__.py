"""A token skips a branch where its state is small: an example of a keep rule, not a method of its own."""
