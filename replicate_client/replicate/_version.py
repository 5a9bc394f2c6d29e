"""The version of the distribution `replicate-vcs`, read by the build and by both packages."""

__version__ = "0.1.0"
