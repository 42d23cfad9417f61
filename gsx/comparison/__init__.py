"""Policies of one model side by side: what they are set to, how they are measured, and the report."""
