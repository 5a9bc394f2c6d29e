"""docs/semantics.md and the tests of mounts: every sentence has a test, and every test a sentence."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/semantics.md"
SENTENCES = re.findall(r"^- \[S-(\d+)\] (.+?)(?=\n\n|\n- |\n#|\Z)", DOCUMENT.read_text(), flags=re.M | re.S)


def proved_by(source: str) -> set[str]:
    """The ids in the marks of the test functions of a module."""
    return {
        argument.value
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] == "proves"
        for argument in decorator.args
        if isinstance(argument, ast.Constant)
    }


def test_every_sentence_is_proved_and_nothing_else_is():
    sources = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    proved = {identifier for path in sources for identifier in proved_by(path.read_text())}
    assert {f"S-{number}" for number, _ in SENTENCES} == proved


def test_numbers_are_used_once_and_in_order():
    numbers = [int(number) for number, _ in SENTENCES]
    assert len(numbers) > 40
    assert numbers == sorted(set(numbers))


def test_every_item_is_a_sentence_with_a_number():
    items = re.findall(r"^- .*", DOCUMENT.read_text(), flags=re.M)
    assert len(items) == len(SENTENCES)
    assert all(text.rstrip().endswith(".") for _, text in SENTENCES)


def test_marks_are_found_however_they_are_written():
    source = """
@proves("S-1", "S-2")
@pytest.mark.proves("S-3")
def test_it(): ...

@proves("S-4")
def no_test(): ...
"""
    assert proved_by(source) == {"S-1", "S-2", "S-3"}
