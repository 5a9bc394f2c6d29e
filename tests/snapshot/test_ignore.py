"""Ignore rules: what is decided by name alone is what the patterns say."""

from hypothesis import example, given
from hypothesis import strategies as st

from replicated.snapshot.ignore import IgnoreRules

NAMES = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "a.log",
        "b.log",
        "x.pem",
        ".env",
        "log",
        ".git",
        "__pycache__",
        "a\n",
        "*",
        "[a]",
        "a b",
    ]
)
SEGMENTS = st.sampled_from(
    ["a", "b", "ab", "*", "**", "*.log", "a*", "?", "*b*", "!a", "\\a", "[ab]", "x.pem", ".env", "", "a "]
)
PATTERNS = st.lists(
    st.tuples(
        st.sampled_from(["", "!", "/", "!/", "#"]),
        st.lists(SEGMENTS, min_size=1, max_size=3),
        st.sampled_from(["", "/", " "]),
    ).map(lambda parts: parts[0] + "/".join(parts[1]) + parts[2]),
    max_size=4,
).filter(lambda lines: all(line.strip("!") and _is_valid(line) for line in lines))
DIRECTORIES = st.lists(st.sampled_from(["a", "b", "ab", "log"]), max_size=3)


def _is_valid(line):
    try:
        IgnoreRules([line])
    except ValueError:
        return False
    return True


@given(PATTERNS, PATTERNS, DIRECTORIES, NAMES, st.booleans())
@example(["a/**"], [], [], "a", True)
def test_a_name_that_no_rule_may_concern_is_kept(patterns, in_file, directories, name, is_directory):
    rules = IgnoreRules(patterns)
    directory = "/".join(directories)
    if directories:
        rules = rules.below(directories[0], in_file)
    path = f"{directory}/{name}" if directory else name
    if not rules.names(directory).concerned([name.encode()]):
        assert rules.decide(path, name, is_directory) == "keep"


def test_most_names_are_not_asked_about():
    rules = IgnoreRules(["*.log", "/data/", "build/*.o", "core.*", "out/**"])
    names = rules.names("")
    assert names.concerned([b"train.py", b"x.o", b"corex", b"model.pt", b"outer"]) == []
    concerned = [b"a.log", b"data", b"core.12", b".env", b"x.pem"]
    assert names.concerned(concerned) == concerned
    assert rules.names("build").concerned([b"x.o"]) == [b"x.o"]
    assert rules.names("out").concerned([b"anything"]) == [b"anything"]


def test_all_names_count_below_a_directory_that_a_pattern_brings_back():
    rules = IgnoreRules(["!keys/"])
    assert rules.decide("keys/x.pem", "x.pem", False) == "keep"
    assert rules.decide("x.pem", "x.pem", False) == "secret"
    assert rules.names("keys").concerned([b"any"]) == [b"any"]
