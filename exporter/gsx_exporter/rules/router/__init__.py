"""Routers: small trained networks say for each token which layers or branches run."""
