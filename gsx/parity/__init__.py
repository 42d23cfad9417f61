"""Parity: the measurements and the report of `gsx verify`."""
