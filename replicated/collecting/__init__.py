"""The collector: deletes packs that nothing needs, without locks, while others write, read and collect.

`collector` does it, step by step; `roots` finds what is needed from outside, `marking` what that needs, and
`planning` decides, without I/O, which packs go. The protocol is in docs/format.md, its proof by exhaustion
in tests/collecting.
"""

from replicated.collecting.collector import Collection, CollectReport, collect

__all__ = ["CollectReport", "Collection", "collect"]
