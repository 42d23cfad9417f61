"""GateSkip: trained gates decide which tokens run which branch."""
