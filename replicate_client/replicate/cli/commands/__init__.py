"""The commands, by theme: each reads its options, asks `query` or `connection`, and renders the answer.

Imports of `query` and `connection` (grpc, protobuf: 200 ms) are inside the functions, so that `--help` and
wrong usage answer at once.
"""
