"""No rule: every token runs every branch."""
