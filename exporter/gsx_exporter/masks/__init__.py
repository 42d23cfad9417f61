"""The keep rules as the reference has them: masks over all tokens of a call, one file a rule.

They share no code with the rules that are traced (`gsx_exporter/rules`): parity compares the two.
"""
