"""Ours and its peers on the same work: `python -m experiments.benchmarks --out results/benchmarks
--size full`.
"""
