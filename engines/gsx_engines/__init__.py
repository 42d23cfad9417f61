"""Floor 2: from a bundle on disk to tokens.

The bundle itself, the runners that execute its graphs, the decoding loop and what serves them. Nothing in
here imports torch or transformers: running a bundle needs NumPy, a runtime and a tokenizer.
"""
