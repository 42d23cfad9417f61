"""CALM: a token leaves at the first exit where the model is confident enough."""
