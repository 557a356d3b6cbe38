"""Audit: whether the arms of a study may be compared, and which of them compute the same.

- `differing_keys.py`: `audit()`, which makes all findings; keys that differ beside those changed on purpose.
- `budgets.py`: budgets that differ (tokens, FLOPs, parameters, memory, cache).
- `tuning.py`: one learning rate for all arms, or sweeps that search arms unequally.
- `confounds.py`: keys of the resolved model that move along with a factor.
- `no_ops.py`, `equivalence.py`: arms that compute the same. `ineffective_settings.py`: settings without effect.
- `findings.py`: findings, and the `allow` rules that permit them.

Text that an arm has already seen is found in `studies/preflight.py`. Results of unequal provenance are left out in
`statistics/run_results.py`.
"""
