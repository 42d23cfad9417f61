"""Routers: small trained networks decide for each token which layers or branches run."""
