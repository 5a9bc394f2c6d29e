"""What is recorded about process and machine."""

import os
import subprocess
import sys

import pytest

from replicate import environment
from replicate.environment import collect, identify_process
from replicate.records import Gpu

PRINT_COMMAND = "from replicate.environment import command_line; print(command_line())"


def output_of(*command, **options):
    done = subprocess.run([*command], capture_output=True, text=True, check=True, **options)
    return done.stdout.strip()


def test_everything_of_this_machine_is_found(tmp_path):
    found = collect(tmp_path)
    assert found.user
    assert found.host == os.uname().nodename
    assert found.python_version == sys.version.split()[0]
    assert os.uname().release in found.system.os
    assert found.system.cpu
    assert found.system.cpu_count == len(os.sched_getaffinity(0))
    assert found.system.memory_bytes > 1 << 20
    assert found.python_packages["pytest"] == pytest.__version__


def test_a_process_is_told_apart_by_boot_pid_and_start():
    process = identify_process()
    assert process.pid == os.getpid()
    assert process.start_ticks > 0
    with open("/proc/sys/kernel/random/boot_id") as file:
        assert process.boot_id == file.read().strip()


def test_a_fork_is_another_process():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, str(identify_process().pid).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 100) == str(pid).encode()
    os.close(reader)
    os.close(writer)


def test_a_script_is_the_command_with_its_arguments(tmp_path):
    (tmp_path / "train.py").write_text(PRINT_COMMAND)
    assert output_of(sys.executable, "train.py", "--lr", "a b", cwd=tmp_path) == "train.py --lr 'a b'"


def test_a_module_is_run_with_its_name(tmp_path):
    package = tmp_path / "rpl_package"
    package.mkdir()
    (package / "train.py").write_text(PRINT_COMMAND)
    (package / "__main__.py").write_text(PRINT_COMMAND)
    run = [sys.executable, "-m"]
    assert output_of(*run, "rpl_package.train", "x", cwd=tmp_path) == "python -m rpl_package.train x"
    assert output_of(*run, "rpl_package", "x", cwd=tmp_path) == "python -m rpl_package x"


def test_source_on_the_command_line_is_recorded():
    assert output_of(sys.executable, "-c", PRINT_COMMAND, "x") == f"python -c '{PRINT_COMMAND}' x"


def test_an_interactive_python_is_just_that():
    assert output_of(sys.executable, input=PRINT_COMMAND) == "python"


def test_a_notebook_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert environment.command_line() == "jupyter"
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/ada/My Notebook.ipynb")
    assert environment.command_line() == "jupyter '/home/ada/My Notebook.ipynb'"


def test_nothing_that_goes_wrong_raises(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    for name in ("imported_distributions", "git_state", "_graphics", "_operating_system", "_processor"):
        monkeypatch.setattr(environment, name, fail)
    monkeypatch.setattr(environment, "_start_ticks", fail)
    monkeypatch.setattr(environment.getpass, "getuser", fail)
    monkeypatch.delattr(sys, "argv")
    found = collect(tmp_path)
    assert found.user == str(os.getuid())
    assert (found.python_packages, found.git, found.system.gpus, found.system.os) == ({}, None, (), "")
    assert found.process.start_ticks == 0


def fake_nvidia_smi(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_graphics_processors_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    fake_nvidia_smi(
        tmp_path,
        monkeypatch,
        'echo "NVIDIA H100, 80GB, 81559, 550.54.15"; echo "NVIDIA GB10, [N/A], 550.54.15"',
    )
    gpus, driver = environment._graphics()
    assert gpus == (Gpu("NVIDIA H100, 80GB", 81559 << 20), Gpu("NVIDIA GB10", 0))
    assert driver == "550.54.15"


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "exec sleep 1000"])
def test_an_nvidia_smi_that_fails_is_passed_over(tmp_path, monkeypatch, script):
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(environment, "_NVIDIA_SMI_TIMEOUT_S", 0.2)
    assert environment._graphics() == environment._read_nvidia_proc(environment._NVIDIA_PROC)


def test_the_files_of_the_driver_tell_names_and_version(tmp_path):
    for number, name in enumerate(["NVIDIA A100", "NVIDIA T4"]):
        file = tmp_path / "gpus" / f"0000:0{number}:00.0" / "information"
        file.parent.mkdir(parents=True)
        file.write_text(f"Model: \t\t {name}\nIRQ: 3\n")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    )
    gpus, driver = environment._read_nvidia_proc(tmp_path)
    assert gpus == (Gpu("NVIDIA A100", 0), Gpu("NVIDIA T4", 0))
    assert driver == "550.54.15"
    assert environment._read_nvidia_proc(tmp_path / "nowhere") == ((), "")
