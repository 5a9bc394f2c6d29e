"""The parts of `benchmarks/store.py`, one module for each group of figures."""
