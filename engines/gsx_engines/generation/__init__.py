"""The decoding loop over the runner interface: plain, or with a draft that the model verifies."""
