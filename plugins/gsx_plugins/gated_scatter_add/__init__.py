"""`GatedScatterAdd`: kept rows times their gate, added to the residual stream (README.md in this folder)."""
