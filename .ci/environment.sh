# Sourced by examples/demo.sh and tests/run.sh: from a fresh machine to an environment that runs the project.
#
#   prepare_environment VENV EXTRAS   makes the virtual environment and installs the project into it
#   try_file_system_tools             installs xfsprogs and btrfs-progs when they are missing and we may
#   require_fuse                      installs Debian's fuse3 when it is missing and we may, else says how
#   require_old_fuse                  the same for libfuse2, which only the tests of one engine need
#
# PYTHON chooses the interpreter (3.10 or later; default: python3).

say() { printf '%s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo "$@"
    else
        return 1
    fi
}

install_debian_packages() {
    command -v apt-get >/dev/null || return 1
    as_root apt-get update -qq >&2 && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >&2
}

require_fuse() {
    if command -v fusermount3 >/dev/null; then
        return
    fi
    say "Installing fuse3 (for mounts) …"
    if ! install_debian_packages fuse3; then
        say "error: fuse3 is missing, and this user may not install it"
        say "hint: ask an administrator for \`apt-get install fuse3\` (other systems: the package with fusermount3 and libfuse3)"
        exit 1
    fi
}

# Without it the tests of the engine over plain fusepy fail: they are never skipped.
require_old_fuse() {
    if "${PYTHON:-python3}" -c 'import ctypes; ctypes.CDLL("libfuse.so.2")' 2>/dev/null; then
        return
    fi
    say "Installing libfuse2 (for tests) …"
    # Debian and Ubuntu from 2024 on name it after the size of time_t.
    if ! install_debian_packages libfuse2 && ! install_debian_packages libfuse2t64; then
        say "error: libfuse2 is missing, and this user may not install it"
        say "hint: ask an administrator for \`apt-get install libfuse2\` (other systems: the package with libfuse.so.2)"
        exit 1
    fi
}

# For the tests that make file systems of their own; they are skipped where that cannot be done.
try_file_system_tools() {
    if command -v mkfs.xfs >/dev/null && command -v mkfs.btrfs >/dev/null; then
        return
    fi
    say "Installing xfsprogs and btrfs-progs (for tests) …"
    install_debian_packages xfsprogs btrfs-progs || say "warning: tests on XFS and Btrfs will be skipped"
}

prepare_environment() {
    local venv=$1 extras=$2 python=${PYTHON:-python3} stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        say "error: Python 3.10 or later is needed; \`$python\` is $("$python" --version 2>&1 || echo missing)"
        say "hint: PYTHON=/path/to/python3.11 $0"
        exit 1
    fi
    # An environment of another Python, or one whose making was interrupted, is made anew.
    stamp="$("$python" -c 'import sys; print(sys.executable, sys.version)') $extras $(cat pyproject.toml | cksum)"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "Making the virtual environment $venv …"
    rm -rf "$venv"
    if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
        say "Installing python3-venv …"
        rm -rf "$venv"
        if ! install_debian_packages python3-venv || ! "$python" -m venv "$venv"; then
            say "error: \`$python -m venv\` does not work here"
            say "hint: apt-get install python3-venv"
            exit 1
        fi
    fi
    say "Installing replicate and what it needs …"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    # An editable install is not compiled, and where PYTHONDONTWRITEBYTECODE is set it never would be.
    "$venv/bin/python" -m compileall -q replicated replicate_client
    printf '%s\n' "$stamp" >"$venv/.prepared"
}
