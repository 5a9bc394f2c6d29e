"""The parts of `benchmarks/capture.py`, one module for each group of figures."""
