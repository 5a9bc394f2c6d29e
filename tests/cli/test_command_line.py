"""Parsing, exit codes and streams of the program. No daemon is started here."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from replicate.cli import main
from replicate.cli.grammar import GlobalOption
from replicate.cli.program import program
from replicate.cli.reference import render_reference

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-m", "replicate.cli"]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A home of its own, and nothing of the environment of whoever runs the tests."""
    monkeypatch.setenv("REPLICATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("REPLICATE_REPOSITORY", "REPLICATE_PROJECT_DIR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(environment, capsys):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def run(*arguments):
        status = main.run(arguments)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, captured.out, captured.err)

    return run


def walk(command, path=("replicate",)):
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            yield from walk(child, (*path, name))


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from replicate.cli.main import run\n"
        "status = run(['--help'])\n"
        "heavy = ('grpc', 'google.protobuf', 'yaml', 'replicate.query', 'replicate.wire')\n"
        "print([name for name in heavy if name in sys.modules], status)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[] 0\n")


@pytest.mark.parametrize("path", [path[1:] for path, _ in walk(program)], ids=" ".join)
def test_every_command_teaches_by_example(run, path):
    result = run(*path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: replicate")
    if path not in {("daemon", "start"), ("daemon", "stop"), ("daemon", "status")}:
        assert "Examples:\n" in result.stdout


def test_every_command_takes_the_global_options():
    for path, command in walk(program):
        names = {name for p in command.params if isinstance(p, GlobalOption) for name in p.opts}
        assert names == {
            *("-D", "--project-directory", "-R", "--repository", "-v", "--verbose", "--version")
        }, path


@pytest.mark.parametrize("arguments", [["--version"], ["ls", "--version"], ["daemon", "start", "--version"]])
def test_version(run, arguments):
    result = run(*arguments)
    assert result.returncode == 0
    assert re.fullmatch(r"replicate \d+\.\d+\S*\n", result.stdout)


def test_without_a_command_the_help_is_shown(run):
    result = run()
    assert result.returncode == 0 and "Commands:" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["lss"], "no such command: lss", "did you mean `ls`?"),
        (["remove"], "no such command: remove", "did you mean `rm`?"),
        (["daemon", "stat"], "no such command: stat", "did you mean `start`?"),
        (["qqqqqq"], "no such command: qqqqqq", "see `replicate --help`"),
        (["ls", "--jsno"], "no such option: --jsno", "did you mean `--json`?"),
        (["ls", "-Z"], "no such option: -Z", "see `replicate ls --help`"),
        (["--repo"], "no such option: --repo", "did you mean `--repository`?"),
        (["daemon"], "missing command", "see `replicate daemon --help`"),
        (["show"], "missing argument 'ID'", "see `replicate show --help`"),
        (["show", "abcd", "bcde"], "got unexpected extra argument (bcde)", "see `replicate show --help`"),
        (["show", "zz"], "invalid id: 'zz'", "an id is hexadecimal"),
        (["show", ""], "invalid id: ''", "an id is hexadecimal"),
        (["show", "../etc"], "invalid id: '../etc'", "an id is hexadecimal"),
        (["show", "abc"], "id is too short: 'abc'", "give at least 4 characters"),
        (["show", "abcd:worst"], "unknown selection 'worst' in 'abcd:worst'", "use :best"),
        (["rm", "abcd", "x"], "invalid id: 'x'", "an id is hexadecimal"),
        (["rm", "abcd:code"], "the files that an experiment began with cannot be removed", "without :code"),
        (["ls", "-n", "0"], "invalid value for '-n' / '--limit'", "see `replicate ls --help`"),
        (["ls", "-q", "--json"], "-q/--quiet prints only ids and cannot go with --json", "see"),
        (["ls", "-q", "--all"], "-q/--quiet prints only ids and cannot go with --all", "see"),
        (["ls", "--csv", "--json"], "--json and --csv cannot go together", "see"),
        (["flush", "--timeout", "-1"], "invalid value for '--timeout'", "see"),
        (["cat", "abcd", "../x"], "not a path in a snapshot: ../x", "give it relative"),
        (["cat", "abcd", "/etc/passwd"], "not a path in a snapshot: /etc/passwd", "give it relative"),
        (["files", "abcd", "a/../../b"], "not a path in a snapshot: a/../../b", "give it relative"),
        (["checkout", "abcd", "--path", ".."], "not a path in a snapshot: ..", "give it relative"),
        (["diff", "abcd", "bcde", "--json", "--content"], "--content and --json cannot go together", "see"),
        (["mount"], "missing argument '[ID] DIR'", "see `replicate mount --help`"),
        (["mount", "a", "b", "c"], "expected [ID] DIR: an id and a directory, or only a directory", "see"),
        (["mount", "nothex", "dir"], "invalid id: 'nothex'", "an id is hexadecimal"),
        (["mount", "3f9c2a1"], "no directory to mount 3f9c2a1 on (or ./3f9c2a1, to mount", "see"),
        (["mount", "latest:best"], "no directory to mount latest:best on", "see"),
        (["mount", "", "dir"], "invalid id: ''", "an id is hexadecimal"),
        (["mount", "latest", ""], "the value of DIR is empty", "was a variable of the shell not set?"),
        (["mount", ""], "the value of DIR is empty", "was a variable of the shell not set?"),
        (["umount", ""], "the value of DIR|ID is empty", "was a variable of the shell not set?"),
        (["umount"], "give a directory, an id, or --all", "see"),
        (["umount", "x", "--all"], "give a directory, an id, or --all", "see"),
        (["completion", "tcsh"], "invalid value for 'SHELL'", "see"),
        (["completion"], "missing argument 'SHELL', one of bash, zsh, fish", "see"),
        (["ls", "-n", "9" * 20], "invalid value for '-n' / '--limit'", "see `replicate ls --help`"),
        (["daemon", "logs", "-n", "9" * 20], "invalid value for '-n' / '--lines'", "see"),
        (["flush", "--timeout", "nan"], "invalid value for '--timeout'", "see"),
        (["cat", "abcd", ""], "the value of PATH is empty", "was a variable of the shell not set?"),
        (["cat", "abcd", "x/.."], "not a file but the whole snapshot: x/..", "`replicate files ID`"),
        (["files", "abcd", ""], "the value of PATH is empty", "was a variable of the shell not set?"),
        (["checkout", "abcd", "--path", ""], "the value of --path is empty", "was a variable"),
        (["checkout", "abcd", "-o", ""], "the value of -o/--output-directory is empty", "was a variable"),
        (["ls", "-D", ""], "the value of -D/--project-directory is empty", "was a variable of the shell"),
        (["-R", "", "ls"], "the value of -R/--repository is empty", "was a variable of the shell not set?"),
        (["show", "\x1b[31m\n"], "invalid id: '\\x1b[31m\\n'", "an id is hexadecimal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(run, arguments, message, hint):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    error, advice = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert advice.startswith(f"hint: {hint}")


@pytest.mark.parametrize("before", [True, False])
def test_global_options_may_stand_before_and_after_the_command(run, tmp_path, before):
    option = ["-D", str(tmp_path / "missing")]
    result = run(*option, "ls") if before else run("ls", *option)
    assert result.returncode == 1
    assert result.stderr == f"error: the project directory is not a directory: {tmp_path}/missing\n"


def test_the_option_after_the_command_wins(run, tmp_path):
    result = run("-R", "ftp://one", "ls", "--repository", "ftps://two")
    assert result.returncode == 1
    assert "error: not a repository URL: 'ftps://'" in result.stderr


def test_a_broken_config_is_named(run, tmp_path):
    (tmp_path / "replicate.yaml").write_text("repostory: file://x\n")
    result = run("ls")
    assert result.returncode == 1
    assert f"{tmp_path}/replicate.yaml:1: unknown key `repostory`" in result.stderr
    assert "hint: did you mean `repository`?" in result.stderr


def test_the_daemon_status_starts_nothing(run, tmp_path):
    result = run("daemon", "status", "--json")
    assert result.returncode == 3
    data = json.loads(result.stdout)
    assert data["running"] is False and data["pid"] is None
    assert data["socket"].startswith(str(tmp_path / "home"))
    assert run("daemon", "status").stdout.startswith("not running")


def test_stopping_no_daemon_is_no_error(run):
    result = run("daemon", "stop")
    assert (result.returncode, result.stderr) == (0, "The daemon does not run\n")


def test_no_log_yet(run, tmp_path):
    result = run("daemon", "logs")
    assert result.returncode == 1
    assert result.stderr.startswith(
        f"error: there is no log yet: {tmp_path}/home/logs/replicated.log\nhint: "
    )


def write_log(tmp_path, lines):
    log = tmp_path / "home" / "logs" / "replicated.log"
    log.parent.mkdir(parents=True)
    log.write_text(lines)


def test_the_log_cannot_act_on_the_terminal(run, tmp_path):
    write_log(tmp_path, "one\n\x1b[2Jtwo\n")
    assert run("daemon", "logs", "-n", "1").stdout == "\\x1b[2Jtwo\n"


def test_a_closed_pipe_ends_quietly_with_141(environment, tmp_path):
    write_log(tmp_path, "a line of the log\n" * 100_000)
    script = f"{' '.join(MAIN)} daemon logs -n 100000 | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (141, "a line of the log\n", "")


def test_closed_streams_are_endured(tmp_path):
    result = subprocess.run(
        ["bash", "-c", f"{' '.join(MAIN)} --version >&-; {' '.join(MAIN)} nonsense 2>&-"],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_a_bug_of_ours_says_so_and_shows_the_traceback_on_request(tmp_path):
    code = (
        "import sys\n"
        "from replicate.cli import main\n"
        "from replicate.cli.program import program\n"
        "@program.command('crash')\n"
        "def crash():\n"
        "    raise RuntimeError('what?\\x1b[31m')\n"
        "sys.exit(main.run(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "REPLICATE_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code, "crash"]
    plain = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: this is a bug in replicate: RuntimeError: what?\\x1b[31m\nhint: ")
    assert f"{tmp_path}/logs/replicated.log" in plain.stderr
    assert "Traceback" not in plain.stderr
    verbose = subprocess.run([*run, "-v"], env=environment, capture_output=True, text=True)
    assert verbose.stderr.startswith("Traceback") and "error: this is a bug" in verbose.stderr


def run_on_terminal(arguments, environment):
    """What a command prints when its streams are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*MAIN, *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, **environment},
    )
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how a pseudo-terminal says that nobody writes to it any more
            break
        if not piece:
            break
        output += piece
    os.close(leader)
    process.wait(timeout=60)
    return output.decode()


def test_colours_only_on_a_terminal_and_never_with_no_color(run):
    assert "\x1b[" not in run("lss").stderr
    assert "\x1b[31merror:\x1b[0m" in run_on_terminal(["lss"], {"TERM": "xterm", "NO_COLOR": ""})
    assert "\x1b[" not in run_on_terminal(["lss"], {"TERM": "xterm", "NO_COLOR": "1"})
    assert "\x1b[" not in run_on_terminal(["lss"], {"TERM": "dumb", "NO_COLOR": ""})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(run, shell):
    result = run("completion", shell)
    assert result.returncode == 0
    assert "_REPLICATE_COMPLETE" in result.stdout


def test_completion_answers_the_shell():
    words = {"_REPLICATE_COMPLETE": "bash_complete", "COMP_WORDS": "replicate che", "COMP_CWORD": "1"}
    answer = subprocess.run(MAIN, env={**os.environ, **words}, capture_output=True, text=True)
    assert answer.stdout == "plain,checkout\n"


def test_the_reference_is_that_of_the_commands():
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == render_reference(), (
        "run `python -m replicate.cli.reference > docs/cli.md`"
    )
