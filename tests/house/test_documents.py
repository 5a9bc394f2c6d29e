"""Documents and code say the same: names that documents use exist, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = [
    *(ROOT / "replicated").rglob("*.py"),
    *(ROOT / "replicate_client").rglob("*.py"),
    *(ROOT / "protos").rglob("*.proto"),
    *(ROOT / "examples").rglob("*.py"),
]
#: Documents that speak about the insides: every identifier in backticks must exist.
INTERNAL = ["architecture.md", "concurrency.md"]
#: What looks like an identifier of ours and is somebody else's.
FOREIGN = {"fork", "fstat", "pyproject", "toml"}


def identifiers(text: str) -> set[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = re.findall(r"`([A-Za-z_][\w.]*)`", text)
    return {part for name in quoted for part in name.split(".") if len(part) > 3}


@pytest.mark.parametrize("name", INTERNAL)
def test_identifiers_in_documents_exist_in_the_code(name):
    code = "\n".join(source.read_text() for source in SOURCES)
    modules = {part for source in SOURCES for part in (*source.parts, source.stem)}
    words = set(re.findall(r"\w+", code)) | modules
    files = {path.stem for path in DOCUMENTS}
    unknown = identifiers((ROOT / "docs" / name).read_text()) - words - files - FOREIGN
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_every_module_is_named_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    names = {
        path.stem
        for package in ("replicated", "replicate_client/replicate")
        for path in (ROOT / package).iterdir()
    }
    missing = {
        name
        for name in names
        if not name.startswith("_") and name != "py" and not re.search(rf"\b{name}\b", text)
    }
    assert not missing


def test_environment_variables_of_the_code_are_documented():
    code = "\n".join(source.read_text() for source in SOURCES)
    used = set(re.findall(r"\bREPLICATED?_[A-Z_]+\b", code))
    documented = (ROOT / "docs/concepts.md").read_text()
    assert {name for name in used if name not in documented} == set()
