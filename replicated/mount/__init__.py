"""Mounting a snapshot: a read-only file system of its files, in a process of its own.

`filesystem` says what the files are, an engine (`fusepy_engine`) speaks to the kernel, `process` is the
program that joins the two for one mount, and `table` starts, lists and ends these processes for the
daemon. An engine is a function

    serve(filesystem, directory, *, source_name, on_mounted) -> None

that mounts on `directory`, calls `on_mounted` once in a thread of its own when the kernel accepts
requests, and returns when the mount is gone.
"""
