"""How quantized checkpoints store a weight, a module for each layout: what becomes a float tensor while it is read."""
