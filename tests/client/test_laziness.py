"""Importing the library costs nothing: what is heavy is loaded at its first use."""

import json
import subprocess
import sys

import replicate

HEAVY = {"grpc", "google", "boto3", "numpy", "matplotlib", "yaml", "msgpack", "blake3", "click"}


def modules_after(source):
    """The outermost names of the modules that are loaded once `source` has run."""
    report = f"import sys\n{source}\nprint(__import__('json').dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_importing_loads_only_the_standard_library():
    # What the installation itself loads with every start of Python, for editable installs for example.
    always = modules_after("")
    loaded = modules_after("import replicate") - always
    assert loaded - set(sys.stdlib_module_names) == {"replicate"}


def test_naming_everything_loads_nothing_heavy():
    source = "import replicate\nfor name in replicate.__all__: getattr(replicate, name)"
    assert not HEAVY & modules_after(source)


def test_every_public_name_is_there_and_listed():
    assert set(dir(replicate)) == set(replicate.__all__)
    for name in replicate.__all__:
        assert getattr(replicate, name) is not None
    assert issubclass(replicate.errors.NotStored, replicate.ReplicateError)


def test_other_names_are_not_there():
    assert not hasattr(replicate, "checkpoint_everything")
