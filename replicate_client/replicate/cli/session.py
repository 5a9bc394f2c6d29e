"""What the global options of one command line say, and what follows from them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from replicate.cli.console import Console
from replicate.cli.refusals import explain_lost_directory, find_lost_directory
from replicate.errors import ConfigError
from replicate.phrases import escape

if TYPE_CHECKING:
    from replicate.config import ProjectConfig


class Session:
    """The options of one command line, and what follows from them."""

    def __init__(self) -> None:
        self.project_directory: str | None = None
        self.repository: str | None = None
        self.verbose = False

    @cached_property
    def console(self) -> Console:
        """The streams, looked at when they are first used."""
        return Console()

    @cached_property
    def project(self) -> ProjectConfig:
        """The project that the command is about; raises `ConfigError`."""
        from replicate.config import find_project

        try:
            project = find_project(self.project_directory, self.repository)
        except (ConfigError, FileNotFoundError):
            if lost := find_lost_directory():
                message, hint = explain_lost_directory(lost)
                raise ConfigError(message, hint=hint) from None
            raise
        if self.verbose:
            self.console.note(f"project directory: {escape(str(project.directory))}")
            self.console.note(f"repository: {escape(project.repository)} ({project.repository_origin})")
        return project
