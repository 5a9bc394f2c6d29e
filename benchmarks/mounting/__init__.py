"""The parts of `benchmarks/mount.py`: what serves, how it is read, and one module for each case."""
