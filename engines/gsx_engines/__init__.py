"""Floor 2: from a bundle on disk to tokens.

The bundle itself, the runners that execute its graphs, the decoding loop, and serving. Nothing in this package imports
torch or transformers: running a bundle needs only NumPy, a runtime and a tokenizer.
"""
