"""The parts of `benchmarks/object_storage.py`: a bucket, a machine that stores into it, and the cases."""
