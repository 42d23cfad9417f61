"""Training gates and exits by published recipes, on transformers' Trainer, accelerate, PEFT and datasets."""
