"""Mounting a snapshot: a read-only file system of its files, in a process of its own.

`filesystem` says what the files are, an engine (`engines` chooses it) speaks to the kernel, `process` is
the program that joins the two for one mount, and `table` starts, lists and ends these processes for the
daemon.
"""
