"""Comparing policies of one model: how their settings are measured, and the report."""
