"""`files` and `cat`: the files of a snapshot."""

from __future__ import annotations

import click

from replicate.cli.arguments import check_file_path, check_snapshot_path, id_argument, json_option
from replicate.cli.grammar import Command
from replicate.cli.json_output import file_json
from replicate.cli.render.files import render_file
from replicate.cli.session import Session


@click.command(cls=Command)
@id_argument()
@click.argument("path", metavar="[PATH]", required=False, callback=check_snapshot_path)
@json_option
@click.pass_obj
def files(session: Session, reference: str, path: str, as_json: bool) -> None:
    """List the files of a snapshot.

    Prints mode, size, time of the last change and path of each; with PATH only that file, or what lies in
    that directory. The files of a checkpoint include those of its experiment. Bytes of a name that could
    act on a terminal are escaped; --json has them exactly, and hashes too.

    \b
    Examples:
      replicate files 3f9c2a1
      replicate files 3f9c2a1:code src
      replicate files latest --json | jq -r '.[] | select(.size > 1e9) | .path'
    """
    from replicate import query

    console = session.console
    entries = query.list_files(session.project.repository, reference, path)
    if as_json:
        console.write_json_array(file_json(entry) for entry in entries)
        return
    count = 0
    for entry in entries:
        console.write(render_file(entry, console.view))
        count += 1
    if not count:
        console.note("The snapshot has no files" if not path else "The directory is empty")


@click.command(cls=Command)
@id_argument()
@click.argument("path", metavar="PATH", callback=check_file_path)
@click.pass_obj
def cat(session: Session, reference: str, path: str) -> None:
    """Print a file of a snapshot.

    Writes the bytes as they were saved to stdout, and reads no more of the repository than they need.

    \b
    Examples:
      replicate cat 3f9c2a1:code train.py
      replicate cat latest:best model.pt > best.pt
    """
    from replicate import query

    for piece in query.read_file(session.project.repository, reference, path):
        session.console.write_bytes(piece)
