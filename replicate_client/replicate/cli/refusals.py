"""What the operating system refuses, in words: an `OSError` as message and hint.

For errors that nobody closer to the cause has translated. Used by `main`, `session` and `diagnosis`.
"""

from __future__ import annotations

import os


def describe_refusal(error: OSError) -> tuple[str, str]:
    """What went wrong, with the file that it is about if known, and what to do (or nothing)."""
    reason = error.strerror or str(error)
    if isinstance(error.filename, (str, bytes)):
        return f"{reason}: {os.fsdecode(error.filename)}", ""
    if isinstance(error, FileNotFoundError) and (lost := find_lost_directory()):
        return explain_lost_directory(lost)
    return reason, ""


def explain_lost_directory(directory: str) -> tuple[str, str]:
    """Message and hint for somebody whose working directory was deleted."""
    return f"the working directory does not exist any more: {directory}", "change to another directory"


def find_lost_directory() -> str:
    """The name that the working directory had before it was deleted; empty when it was not."""
    try:
        os.getcwd()
    except FileNotFoundError:
        # Linux says so of every name that is gone.
        return os.readlink("/proc/self/cwd").removesuffix(" (deleted)")
    return ""
