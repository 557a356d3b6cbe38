"""Measures this machine: training steps, generation and memory of our models, beside peers of the same shapes.

Contestants take turns within one process, so that a busy machine slows all of them. `run_benchmarks` measures,
`lit_llm.report` prints.
"""
