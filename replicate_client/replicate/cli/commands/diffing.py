"""`diff`: what is different between two experiments or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from replicate.cli.arguments import id_argument, json_option
from replicate.cli.comparison import Compared, compare
from replicate.cli.content_diff import MAX_CONTENT_BYTES, is_binary, unified_diff
from replicate.cli.grammar import Command
from replicate.cli.render.differences import comparison_json, render_comparison
from replicate.cli.render.resolutions import exact_reference, explain_choice, explain_damage
from replicate.cli.session import Session
from replicate.cli.view import View
from replicate.errors import NotStored, RepositoryDamaged
from replicate.phrases import escape, format_size
from replicate.records import FileChange

if TYPE_CHECKING:
    from replicate.query import Resolution

_LINE_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@click.command(cls=Command)
@id_argument("left")
@id_argument("right")
@click.option("--content", "with_content", is_flag=True, help="Also the lines that differ in text files.")
@json_option
@click.pass_obj
def diff(session: Session, left: str, right: str, with_content: bool, as_json: bool) -> None:
    """Compare two experiments or checkpoints.

    Shows what differs in params, packages, Git state, metrics and files. Of an experiment, the best
    checkpoint is compared, else the latest; EXP:code compares only what `init` saved.

    \b
    Examples:
      replicate diff 3f9c2a1 9ab12cd
      replicate diff 3f9c2a1:step=1 3f9c2a1:best
      replicate diff 3f9c2a1:code latest:code --content
    """
    if with_content and as_json:
        raise click.UsageError("--content and --json cannot go together")
    from replicate import query

    console, repository = session.console, session.project.repository
    meanings = query.resolve(repository, left), query.resolve(repository, right)
    references = exact_reference(meanings[0]), exact_reference(meanings[1])
    one, other = (Compared(meant.summary, meant.checkpoint) for meant in meanings)
    changes: list[FileChange] | None = None
    try:
        changes = _compare_files(repository, (one, other), references)
    except (NotStored, RepositoryDamaged) as error:
        console.warn(f"files are not compared: {error.message}")
    for damage in filter(None, map(explain_damage, meanings)):
        console.warn(damage)
    comparison = compare(one, other, changes)
    if as_json:
        console.write_json(comparison_json(comparison))
        return
    for meant in meanings:
        _announce(session, meant)
    console.write(render_comparison(comparison, console.view))
    if with_content:
        for change in changes or ():
            for line in _content_lines(repository, references, change, console.view):
                console.write(line + "\n")


def _compare_files(
    repository: str, sides: tuple[Compared, Compared], references: tuple[str, str]
) -> list[FileChange]:
    """The files that differ; of a side that saved none, all of the other's. Raises `NotStored`."""
    from replicate import query

    if references[0] == references[1]:
        return []
    left, right = sides
    if left.has_files and right.has_files:
        return list(query.diff_files(repository, *references))
    if left.has_files:
        return [FileChange(e.path, e, None) for e in query.list_files(repository, references[0])]
    if right.has_files:
        return [FileChange(e.path, None, e) for e in query.list_files(repository, references[1])]
    return []


def _announce(session: Session, meant: Resolution) -> None:
    note = explain_choice(meant)
    if note:
        session.console.note(f"Comparing {note}")


def _content_lines(
    repository: str, references: tuple[str, str], change: FileChange, view: View
) -> Iterator[str]:
    """The lines of one file that differ, or one line that says why they are not shown."""
    from replicate import query

    entries = (change.left, change.right)
    if any(entry is not None and entry.type != "file" for entry in entries):
        return
    hashes = {entry.hash for entry in entries if entry is not None}
    if len(hashes) == 1 and all(entries):
        return  # only the mode
    yield ""
    path = escape(change.path)
    largest = max(entry.size for entry in entries if entry is not None)
    if largest > MAX_CONTENT_BYTES:
        yield f"{path}: not compared, {format_size(largest)} is more than {format_size(MAX_CONTENT_BYTES)}"
        return
    left, right = (
        None if entry is None else b"".join(query.read_file(repository, reference, change.path))
        for entry, reference in zip(entries, references, strict=True)
    )
    if is_binary(left or b"") or is_binary(right or b""):
        yield f"{path}: binary files differ"
        return
    for line in unified_diff(change.path, left, right):
        style = "bold" if line.startswith(("--- ", "+++ ")) else _LINE_STYLES.get(line[:1], "")
        yield view.paint(line, style)
