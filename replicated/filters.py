"""Filter expressions and sort keys of `replicate ls`: parsed once, applied to summaries. Pure.

    expression  = term { "or" term };  term = factor { "and" factor };  factor = ["not"] primary
    primary     = "(" expression ")" | name operator value
    operator    = "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "~"

A name may hold `/ . - _`, and anything when quoted. A value is quoted, or runs to the next `and`, `or`,
closing parenthesis or the end. `created step status user host command name tag` are built in; any other
name is a metric of the best (else latest) checkpoint, else a param.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal, Protocol, TypeAlias, TypeVar, cast

from replicate.errors import InvalidArgument
from replicate.records import Value, is_number

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "~"]

BUILT_IN = ("created", "step", "status", "user", "host", "command", "name", "tag")
#: An expression of more levels is a mistake or an attack on the parser's stack.
MAX_DEPTH = 50
#: A regular expression that backtracks for ever must not hold up the daemon.
MATCH_TIMEOUT_S = 2.0

_OPERATORS = ("==", "!=", "<=", ">=", "=", "<", ">", "~")
_NAME = re.compile(r"[^\s()=!<>~'\"]+")
_WORD = re.compile(r"[a-z]+")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_VALUE_ENDS = re.compile(r"\s+(?:and|or)(?=[\s(]|$)")
#: What shows that something else was meant than a value of several words.
_NOT_A_VALUE = re.compile(r"[=!<>~'\"]|.*(?:&&|\|\|)")
_AGO = re.compile(r"(\d{1,9})\s*(s|second|m|minute|h|hour|d|day|w|week)s?(?:\s+ago)?")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


# ruff: noqa: D102  (what the names mean, the records say)


class Recorded(Protocol):
    """Of an experiment's record what can be asked for."""

    @property
    def created(self) -> datetime: ...
    @property
    def name(self) -> str: ...
    @property
    def tags(self) -> Sequence[str]: ...
    @property
    def user(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def command(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Value]: ...


class Measured(Protocol):
    """Of a checkpoint what can be asked for."""

    @property
    def step(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, Value]: ...


class Subject(Protocol):
    """An experiment in a list: an `ExperimentSummary`, or what stands for one."""

    @property
    def record(self) -> Recorded: ...
    @property
    def status(self) -> str: ...
    @property
    def latest(self) -> Measured | None: ...
    @property
    def best(self) -> Measured | None: ...


Predicate: TypeAlias = Callable[[Subject], bool]
_S = TypeVar("_S", bound=Subject)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One `name operator value`."""

    name: str
    operator: Operator
    #: The value as written, without its quotes.
    text: str
    #: The value as number, bool, None, list or dict where it reads as one; else the text.
    value: Value


def parse_filter(text: str, now: datetime) -> Predicate:
    """The predicate of one expression; raises `InvalidArgument` naming the text and the place."""
    parser = _Parser(text, now)
    predicate = parser.expression(0)
    parser.expect_end()
    return predicate


def sort_summaries(summaries: Sequence[_S], key: str) -> list[_S]:
    """Summaries in the order of `KEY`, `KEY-asc` or `KEY-desc`; those without the key come last."""
    name, descending = key or "created", False
    for suffix in ("-desc", "-asc"):
        if name.endswith(suffix):
            name, descending = name.removesuffix(suffix), suffix == "-desc"
            break
    present: list[tuple[tuple[int, object], _S]] = []
    absent: list[_S] = []
    for summary in summaries:
        value = _sortable(_look_up(summary, name))
        if value is None:
            absent.append(summary)
        else:
            present.append((value, summary))
    # Numbers before text: values of different types have no order of their own.
    present.sort(key=lambda pair: cast("tuple[int, str]", pair[0]), reverse=descending)
    return [summary for _, summary in present] + absent


def _sortable(value: object) -> tuple[int, object] | None:
    if isinstance(value, datetime):
        return 0, value.timestamp()
    if isinstance(value, bool) or is_number(value):
        return None if value != value else (0, value)
    if isinstance(value, str):
        return 1, value
    if isinstance(value, tuple):
        return (1, ",".join(value)) if value else None
    return None if value is None else (2, json.dumps(value))


def _look_up(summary: Subject, name: str) -> object:
    """The value of a name: None when missing, a datetime for `created`, a tuple for `tag`."""
    record = summary.record
    if name in ("created", "started"):
        return record.created
    if name == "step":
        return summary.latest.step if summary.latest else None
    if name == "status":
        return summary.status
    if name in ("user", "host", "command", "name"):
        return cast("str", getattr(record, name))
    if name in ("tag", "tags"):
        return record.tags
    checkpoint = summary.best or summary.latest
    if checkpoint is not None and name in checkpoint.metrics:
        return checkpoint.metrics[name]
    if name in record.params:
        return record.params[name]
    return _nested(record.params, name)


def _nested(params: object, name: str) -> object:
    """`a.b` of params {"a": {"b": …}}, as configurations are often written."""
    for part in name.split("."):
        if not isinstance(params, dict) or part not in params:
            return None
        params = params[part]
    return params


class _Parser:
    """A recursive-descent parser over one line."""

    def __init__(self, text: str, now: datetime) -> None:
        self._text = text
        self._now = now
        self._at = 0

    def expression(self, depth: int) -> Predicate:
        terms = [self._term(depth)]
        while self._take_word("or"):
            terms.append(self._term(depth))
        return terms[0] if len(terms) == 1 else lambda s: any(term(s) for term in terms)

    def expect_end(self) -> None:
        self._skip_spaces()
        if self._at < len(self._text):
            raise self._error(f"unexpected {self._text[self._at :][:20]!r}")

    def _term(self, depth: int) -> Predicate:
        factors = [self._factor(depth)]
        while self._take_word("and"):
            factors.append(self._factor(depth))
        return factors[0] if len(factors) == 1 else lambda s: all(factor(s) for factor in factors)

    def _factor(self, depth: int) -> Predicate:
        if depth > MAX_DEPTH:
            raise self._error("nested too deeply")
        if self._take_word("not"):
            inner = self._factor(depth + 1)
            return lambda s: not inner(s)
        self._skip_spaces()
        if self._text.startswith("(", self._at):
            self._at += 1
            inner = self.expression(depth + 1)
            self._skip_spaces()
            if not self._text.startswith(")", self._at):
                raise self._error("`)` is missing")
            self._at += 1
            return inner
        return self._comparison()

    def _comparison(self) -> Predicate:
        name = self._name()
        self._skip_spaces()
        operator = next((o for o in _OPERATORS if self._text.startswith(o, self._at)), None)
        if operator is None:
            raise self._error(f"expected one of = != < <= > >= ~ after `{name}`")
        self._at += len(operator)
        if self._text.startswith(_OPERATORS, self._at):
            raise self._error(f"unknown operator {operator}{self._text[self._at]}")
        text, is_quoted = self._value()
        value = text if is_quoted else _interpret(text)
        comparison = Comparison(name, cast("Operator", "=" if operator == "==" else operator), text, value)
        return self._predicate(comparison)

    def _name(self) -> str:
        self._skip_spaces()
        quoted = _QUOTED.match(self._text, self._at)
        found = quoted or _NAME.match(self._text, self._at)
        if found is None:
            raise self._error("expected a name")
        self._at = found.end()
        return _unquoted(found) if quoted else found.group()

    def _value(self) -> tuple[str, bool]:
        self._skip_spaces()
        quoted = _QUOTED.match(self._text, self._at)
        if quoted:
            self._at = quoted.end()
            return _unquoted(quoted), True
        end = self._bare_value_end()
        text = self._text[self._at : end].strip()
        if not text:
            raise self._error("a value is missing")
        if _NOT_A_VALUE.match(text):
            raise self._error(
                f"not a value: {text!r}; quote it if it is one, and combine with `and` and `or`"
            )
        self._at = end
        return text, False

    def _bare_value_end(self) -> int:
        ends = _VALUE_ENDS.search(self._text, self._at)
        end = ends.start() if ends else len(self._text)
        depth = 0
        for position in range(self._at, end):
            if self._text[position] == "(":
                depth += 1
            elif self._text[position] == ")":
                depth -= 1
                if depth < 0:
                    return position
        return end

    def _predicate(self, comparison: Comparison) -> Predicate:
        name, operator = comparison.name, comparison.operator
        if operator == "~":
            matches = self._pattern(comparison.text)
            return lambda s: matches(_look_up(s, name))
        if name in ("created", "started"):
            moment = _parse_moment(comparison.text, self._now)
            if moment is None:
                raise self._error(
                    f"not a date: {comparison.text!r} (2026-11-23, 2026-11-23T10:00, yesterday, 2 days ago)"
                )
            return lambda s: _ordered(s.record.created, operator, moment)
        if name in ("tag", "tags"):
            if operator not in ("=", "!="):
                raise self._error("`tag` takes =, != and ~")
            return lambda s: (comparison.text in s.record.tags) is (operator == "=")
        return lambda s: _compare(_look_up(s, name), comparison)

    def _pattern(self, text: str) -> Callable[[object], bool]:
        import regex  # 40 ms, for the few filters that have one

        try:
            pattern = regex.compile(text)
        except regex.error as error:
            raise self._error(f"not a regular expression: {text!r}: {error}") from None

        def matches(actual: object) -> bool:
            try:
                return any(
                    pattern.search(value, timeout=MATCH_TIMEOUT_S, concurrent=True) is not None
                    for value in _texts(actual)
                )
            except TimeoutError:
                raise InvalidArgument(
                    f"the regular expression takes too long: {text!r}",
                    hint="avoid nested repetition such as (a+)+",
                ) from None

        return matches

    def _take_word(self, word: str) -> bool:
        self._skip_spaces()
        found = _WORD.match(self._text, self._at)
        if found is None or found.group() != word:
            return False
        # `or = 1` compares a param called "or".
        rest = self._text[found.end() :].lstrip()
        if rest.startswith(_OPERATORS) or (word != "not" and not rest):
            return False
        self._at = found.end()
        return True

    def _skip_spaces(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _error(self, reason: str) -> InvalidArgument:
        return InvalidArgument(
            f"cannot read the filter {self._text!r}: {reason} (at character {self._at + 1})",
            hint="for example: --filter 'val/loss < 0.3 and optimizer = adam'",
        )


def _unquoted(found: re.Match[str]) -> str:
    single, double = found.groups()
    return cast("str", single if single is not None else double)


def _interpret(text: str) -> Value:
    if text in ("null", "None"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    if text[0] in "[{":
        try:
            return cast("Value", json.loads(text))
        except (ValueError, RecursionError):
            return text
    return text


def _compare(actual: object, comparison: Comparison) -> bool:
    operator, wanted = comparison.operator, comparison.value
    if actual is None or wanted is None:
        return (actual is None and wanted is None) is (operator == "=") if operator in ("=", "!=") else False
    if isinstance(actual, str):
        if operator not in ("=", "!=") and is_number(wanted):
            return False
        return _ordered(actual, operator, comparison.text)
    if isinstance(actual, bool) or isinstance(wanted, bool):
        same_type = isinstance(actual, bool) and isinstance(wanted, bool)
        return _ordered(actual, operator, wanted) if same_type else operator == "!="
    if is_number(actual) and is_number(wanted):
        return _ordered(actual, operator, wanted)
    if operator == "=":
        return actual == wanted
    return operator == "!=" and actual != wanted


def _ordered(left: object, operator: Operator, right: object) -> bool:
    a, b = cast("float", left), cast("float", right)
    if operator == "=":
        return a == b
    if operator == "!=":
        return a != b
    if operator == "<":
        return a < b
    if operator == "<=":
        return a <= b
    return a > b if operator == ">" else a >= b


def _texts(actual: object) -> Sequence[str]:
    """A value as the texts that a regular expression is tried on: several for tags, none if missing."""
    if actual is None:
        return ()
    if isinstance(actual, tuple):
        return actual
    if isinstance(actual, datetime):
        return (actual.isoformat(),)
    return (actual if isinstance(actual, str) else json.dumps(actual),)


def _parse_moment(text: str, now: datetime) -> datetime | None:
    """A date as people write it; without a time zone it is local."""
    lowered = text.strip().lower()
    today = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    if lowered in ("now", "today", "yesterday"):
        return {"now": now, "today": today, "yesterday": today - timedelta(days=1)}[lowered]
    ago = _AGO.fullmatch(lowered)
    if ago:
        try:
            return now - timedelta(seconds=int(ago.group(1)) * _UNIT_SECONDS[ago.group(2)[0]])
        except OverflowError:
            return None
    try:
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text.strip()))
        return moment.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
