"""Network: the parts that a study switches, one folder each.

`config.py` holds the fields, the analytic cost and the paper, and loads no torch, so that a plan is made in no time;
`module.py` holds what computes.
"""
