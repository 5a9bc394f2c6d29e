"""The command `replicated`: the daemon, and the processes that serve mounts, store or collect.

People use `replicate`, which starts these on demand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicate._version import __version__

if TYPE_CHECKING:
    import argparse

# Imports are where they are used: a mount is there the sooner the less its process loads.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["mount-process"]:
        from replicated.mount import process

        return process.main(arguments[1:])
    if arguments[:1] == ["store-process"]:
        from replicated.priority import take_low_priority

        # Before anything else is loaded, and any thread begins.
        take_low_priority(is_urgent="--urgent" in arguments)
        from replicated.snapshot import store_process

        return store_process.main(arguments[1:])
    if arguments[:1] == ["gc-process"]:
        from replicated.priority import take_low_priority

        # Somebody waits for it.
        take_low_priority(is_urgent=True)
        from replicated.collecting import process as collecting_process

        return collecting_process.main()
    return _serve(_parse(arguments))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    import argparse

    parser = argparse.ArgumentParser(
        prog="replicated", description="The daemon of replicate; `replicate` starts it on demand."
    )
    parser.add_argument("--version", action="version", version=f"replicated {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the daemon in the foreground")
    serve.add_argument("--on-demand", action="store_true", help="leave when there is nothing to do any more")
    serve.add_argument(
        "--idle-exit", type=float, default=None, metavar="SECONDS", help="how long that takes (600)"
    )
    serve.add_argument(
        "--limit",
        type=_natural,
        default=0,
        metavar="BYTES_PER_S",
        help="send at most so much to repositories (0: no limit)",
    )
    return parser.parse_args(arguments)


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("negative")
    return value


def _serve(options: argparse.Namespace) -> int:
    from replicate.errors import ReplicateError
    from replicate.home import find_home
    from replicated import daemon

    idle_exit_s = daemon.IDLE_EXIT_S if options.idle_exit is None else options.idle_exit
    try:
        daemon.serve(
            find_home(), on_demand=options.on_demand, idle_exit_s=idle_exit_s, upload_limit=options.limit
        )
    except ReplicateError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
