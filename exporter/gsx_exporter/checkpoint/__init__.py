"""A Hugging Face model directory: finding, understanding, checking and reading it."""
