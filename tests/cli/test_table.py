from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from replicate.cli.table import Cell, Column, render_table
from replicate.cli.text import display_width
from replicate.cli.view import View


def test_columns_are_aligned_and_lines_have_no_trailing_spaces(view):
    columns = [Column("NAME"), Column("SIZE", right=True), Column("NOTE")]
    rows = [[Cell("a"), Cell("1000"), Cell("")], [Cell("longer"), Cell("2"), Cell("x")]]
    assert render_table(columns, rows, view) == (
        "NAME    SIZE  NOTE\n"
        "a       1000\n"
        "longer     2  x\n"
    )  # fmt: skip


def test_rows_of_several_lines_are_set_apart(view):
    rows = [[Cell("a"), Cell("x=1\ny=2")], [Cell("b"), Cell("x=3")]]
    assert render_table([Column("ID"), Column("PARAMS")], rows, view) == (
        "ID  PARAMS\n"
        "a   x=1\n"
        "    y=2\n"
        "\n"
        "b   x=3\n"
    )  # fmt: skip


def test_the_widest_column_that_may_gives_way(view):
    columns = [Column("ID"), Column("ONE", shrinks_to=4), Column("TWO")]
    rows = [[Cell("1"), Cell("abcdefghij"), Cell("abcdefghij")]]
    assert render_table(columns, rows, replace(view, width=20)) == (
        "ID  ONE   TWO\n"
        "1   abc…  abcdefghij\n"
    )  # fmt: skip


def test_nothing_is_cut_without_a_terminal(view):
    text = "x" * 500
    assert text in render_table([Column("A", shrinks_to=4)], [[Cell(text)]], view)


def test_colour_does_not_move_columns(view):
    rows = [[Cell("a", "red"), Cell("b")]]
    colored = render_table([Column("LONG"), Column("B")], rows, replace(view, color=True))
    assert "\x1b[31ma\x1b[0m     b" in colored


@given(st.lists(st.tuples(st.text("ab 実"), st.text("xy")), min_size=1), st.integers(26, 80))
def test_a_table_fits_its_width(texts, width):
    view = View(now=None, width=width)
    columns = [Column("FIRST", shrinks_to=8), Column("SECOND", shrinks_to=8)]
    table = render_table(columns, [[Cell(a), Cell(b)] for a, b in texts], view)
    assert all(display_width(line) <= width for line in table.splitlines())
