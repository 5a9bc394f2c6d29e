"""The cache of contents on this machine's disk: verified chunks, and whole plain files."""

from replicated.cache.content import DEFAULT_CACHE_BYTES, ContentCache
from replicated.cache.plain import PlainFile

__all__ = ["DEFAULT_CACHE_BYTES", "ContentCache", "PlainFile"]
