"""GateSkip: trained gates say which token may skip which branch."""
