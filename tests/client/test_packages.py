"""Which distributions imported modules come from, in a site directory made by hand."""

import importlib
import sys

import pytest

from replicate.packages import imported_distributions


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory on sys.path to install into; what is imported from it is forgotten at the end."""
    directory = tmp_path / "site-packages"
    directory.mkdir()
    monkeypatch.syspath_prepend("/nonexistent-script-directory")
    monkeypatch.setattr(sys, "path", [sys.path[0], str(directory), *sys.path[1:]])
    before = set(sys.modules)
    yield directory
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(site, name, version, *files, spelled=None, record=True, suffix=".dist-info"):
    """Files of a distribution and its metadata."""
    directory = site / f"{name.replace('-', '_')}-{version}{suffix}"
    directory.mkdir()
    metadata = (
        f"Metadata-Version: 2.1\nName: {spelled or name}\nVersion: {version}\n\nName: in the description\n"
    )
    (directory / ("METADATA" if suffix == ".dist-info" else "PKG-INFO")).write_text(metadata)
    for file in files:
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    if record:
        lines = [f"{file},sha256=x,0" for file in files]
        (directory / "RECORD").write_text("\n".join([*lines, f"{directory.name}/RECORD,,"]) + "\n")
    return directory


def distributions(*names):
    importlib.invalidate_caches()
    for name in names:
        importlib.import_module(name)
    return imported_distributions(
        {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in {n.partition(".")[0] for n in names}
        }
    )


def test_a_distribution_has_the_name_of_its_metadata(site):
    install(site, "rpl-under-score", "1.0", "rpl_under_score/__init__.py", spelled="RPL.Under-Score")
    assert distributions("rpl_under_score") == {"RPL.Under-Score": "1.0"}


@pytest.mark.parametrize("file", ["rpl_learn/__init__.py", "rpl_learn.py"])
def test_a_module_need_not_have_the_name_of_its_distribution(site, file):
    install(site, "rpl-scikit-learn", "1.9", file)
    install(site, "rpl-other", "2.0", "rpl_learn_more.py", "data/rpl_learn.py")
    assert distributions("rpl_learn") == {"rpl-scikit-learn": "1.9"}


def test_only_what_was_imported_counts(site):
    install(site, "rpl-one", "1", "rpl_one.py")
    install(site, "rpl-two", "2", "rpl_two.py")
    assert distributions("rpl_one") == {"rpl-one": "1"}


def test_parts_of_a_namespace_package_have_distributions_of_their_own(site):
    install(site, "rpl-cloud-storage", "1", "rpl_cloud/storage/__init__.py")
    install(site, "rpl-cloud-queue", "2", "rpl_cloud/queue.py")
    install(site, "rpl-cloud-unused", "3", "rpl_cloud/unused.py")
    assert distributions("rpl_cloud.storage", "rpl_cloud.queue") == {
        "rpl-cloud-queue": "2",
        "rpl-cloud-storage": "1",
    }


def test_a_distribution_without_a_list_of_files_is_known_by_its_top_level_names(site):
    directory = install(site, "rpl-legacy", "0.9", "rpl_old.py", record=False, suffix=".egg-info")
    (directory / "top_level.txt").write_text("rpl_other\nrpl_old\n")
    assert distributions("rpl_old") == {"rpl-legacy": "0.9"}


def test_an_editable_install_is_known_by_where_its_source_lies(site, tmp_path):
    source = tmp_path / "work tree" / "src"
    source.mkdir(parents=True)
    (source / "rpl_mine.py").write_text("")
    sys.path.append(str(source))
    directory = install(site, "rpl-project", "0.1")
    (directory / "direct_url.json").write_text(
        f'{{"url": "{(tmp_path / "work tree").as_uri()}", "dir_info": {{"editable": true}}}}'
    )
    assert distributions("rpl_mine") == {"rpl-project": "0.1"}


def test_modules_of_the_project_itself_have_no_distribution(site, tmp_path):
    (tmp_path / "rpl_train.py").write_text("")
    sys.path.append(str(tmp_path))
    assert distributions("rpl_train") == {}


def test_broken_metadata_is_passed_over(site):
    directory = install(site, "rpl-good", "1", "rpl_good.py")
    (directory / "direct_url.json").write_text("not JSON")
    (site / "rpl_broken-1.dist-info").mkdir()
    (site / "rpl_broken.py").write_text("")
    (site / "file.dist-info").write_text("a file")
    assert distributions("rpl_good", "rpl_broken") == {"rpl-good": "1"}


def test_modules_that_are_odd_objects_are_passed_over():
    class Odd:
        def __getattr__(self, name):
            raise RuntimeError("not now")

    assert imported_distributions({"rpl_none": None, "rpl_odd": Odd(), "rpl_number": 5}) == {}


def test_the_standard_library_is_no_distribution():
    assert imported_distributions({"json": importlib.import_module("json"), "sys": sys}) == {}


def test_real_packages_are_found():
    import numpy
    import yaml

    found = imported_distributions()
    assert found["PyYAML"] == yaml.__version__
    assert found["numpy"] == numpy.__version__
    assert "protobuf" in found or "google" not in sys.modules
    assert list(found) == sorted(found, key=str.lower)
