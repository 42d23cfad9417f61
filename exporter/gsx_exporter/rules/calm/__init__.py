"""CALM: a token exits at the first exit where the model is confident enough."""
