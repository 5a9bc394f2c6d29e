"""`doctor`: finds out what is wrong on this machine, and says how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.exceptions import Exit

from replicate.cli.arguments import json_option
from replicate.cli.grammar import Command
from replicate.cli.session import Session
from replicate.cli.view import View
from replicate.config import resolve_repository
from replicate.home import find_home
from replicate.phrases import escape, plural

if TYPE_CHECKING:
    from replicate.cli.diagnosis import Finding

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(cls=Command)
@click.option(
    "--store",
    "store_url",
    metavar="URL",
    help="Try out what the store at URL (file://, s3:// or gs://) does, and nothing else.",
)
@json_option
@click.pass_obj
def doctor(session: Session, store_url: str | None, as_json: bool) -> None:
    """Check this machine and say how to mend what is wrong.

    Looks at the installation, disk space, the daemon, the ways to mount and the repository, in which it
    writes and removes small test objects. Exits with 1 if something fails.

    With --store it tries out a bucket, or a directory, for what differs between servers: conditional
    writes, listing and reading right after writing, ranges, checksums, deleting, the clock, and 8 MiB there
    and back. It says what follows from each, makes no bucket and removes what it wrote (below probe/).

    \b
    Examples:
      replicate doctor
      replicate doctor -R file:///mnt/share/runs
      replicate doctor --store s3://lab/models
    """
    from replicate.cli.diagnosis import diagnose, diagnose_store

    console = session.console
    findings = []
    if store_url is None:
        found = diagnose(find_home(), lambda: session.project)
    else:
        found = diagnose_store(resolve_repository(store_url, Path.cwd()))
    for finding in found:
        findings.append(finding)
        if not as_json:
            console.write(render_finding(finding, console.view))
            console.flush()
    failed = any(finding.outcome == "fail" for finding in findings)
    if as_json:
        console.write_json(
            {
                "ok": not failed,
                "checks": [
                    {
                        "name": f.name,
                        "outcome": f.outcome,
                        "value": f.value or None,
                        "detail": f.detail,
                        "hint": f.hint or None,
                    }
                    for f in findings
                ],
            }
        )
    else:
        console.note(summarize(findings))
    if failed:
        raise Exit(1)


def render_finding(finding: Finding, view: View) -> str:
    """One line, and below it the hint if there is one."""
    outcome = view.paint(f"{finding.outcome:4}", _STYLES[finding.outcome])
    text = f"{outcome}  {escape(finding.name)}: {escape(finding.detail)}\n"
    return text + (f"      {escape(finding.hint)}\n" if finding.hint else "")


def summarize(findings: Sequence[Finding]) -> str:
    """One sentence on all of them."""
    fails, warnings = (sum(f.outcome == outcome for f in findings) for outcome in ("fail", "warn"))
    if not fails and not warnings:
        return "Everything is in order"
    return f"{plural(fails, 'problem')}, {plural(warnings, 'warning')}"
