from replicate.cli.content_diff import is_binary, unified_diff


def test_changed_lines_with_their_context():
    lines = list(unified_diff("a.py", b"one\ntwo\n", b"one\n2\n"))
    assert lines == ["--- a/a.py", "+++ b/a.py", "@@ -1,2 +1,2 @@", " one", "-two", "+2"]


def test_an_added_file_comes_from_nowhere():
    assert list(unified_diff("a", None, b"x\n"))[:2] == ["--- /dev/null", "+++ b/a"]
    assert list(unified_diff("a", b"x\n", None))[:2] == ["--- a/a", "+++ /dev/null"]


def test_a_missing_last_newline_is_said():
    assert list(unified_diff("a", b"x\n", b"x"))[-3:] == ["-x", "+x", "\\ No newline at end of file"]


def test_bytes_that_are_not_text_stay_visible():
    lines = list(unified_diff("n\n\udcff", b"\xff\ta\x1b\r\n", b""))
    assert lines[0] == "--- a/n\\n\\xff"
    assert lines[-1] == "-\\xff\ta\\x1b\\r"


def test_a_nul_makes_it_binary():
    assert is_binary(b"PK\0") and not is_binary("é\n".encode("latin-1"))
