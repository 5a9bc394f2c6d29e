"""What users pass as params, metrics, steps, tags and primary metric: accepted, converted or refused."""

import enum
import math
from datetime import date, datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from replicate import records
from replicate.records import (
    MAX_STEP,
    PrimaryMetric,
    validate_mapping,
    validate_primary_metric,
    validate_step,
    validate_tags,
    validate_text,
)


class Colour(enum.IntEnum):
    RED = 1


class Optimiser(str, enum.Enum):
    ADAM = "adam"


class Tensor:
    """What torch, TensorFlow and JAX tensors have in common with one another."""

    def __init__(self, data):
        self._data = np.array(data)
        self.shape = self._data.shape


class TorchTensor(Tensor):
    def detach(self):
        return self

    def cpu(self):
        return self

    def tolist(self):
        return self._data.tolist()


class TensorFlowTensor(Tensor):
    def numpy(self):
        return self._data


class BrokenTensor(TorchTensor):
    def tolist(self):
        raise RuntimeError("device lost")

    item = tolist


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (None, None),
        (True, True),
        (10**40, 10**40),
        (0.5, 0.5),
        (-math.inf, -math.inf),
        ("ü\n", "ü\n"),
        ((1, (2,)), [1, [2]]),
        ({"a": {"b": []}}, {"a": {"b": []}}),
        (Path("/data/x"), "/data/x"),
        (date(2026, 11, 23), "2026-11-23"),
        (datetime(2026, 11, 23, 6, tzinfo=timezone.utc), "2026-11-23T06:00:00+00:00"),
        (Colour.RED, 1),
        (Optimiser.ADAM, "adam"),
        ({Optimiser.ADAM: [Optimiser.ADAM]}, {"adam": ["adam"]}),
        pytest.param(2 - 2**13_000, 2 - 2**13_000, id="largest"),
        (np.longdouble(1.5), 1.5),
        (np.array([0.5], dtype=np.longdouble), [0.5]),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(1.5), 1.5),
        (TorchTensor([1.0, 2.0]), [1.0, 2.0]),
        (TorchTensor(1.0), 1.0),
        (TensorFlowTensor([1, 2]), [1, 2]),
    ],
)
def test_values_are_recorded_as_plain_ones(given, recorded):
    found = validate_mapping({"key": given}, "params")["key"]
    assert found == recorded
    assert type(found) is type(recorded)


def test_nan_is_recorded():
    assert math.isnan(validate_mapping({"loss": np.float32("nan")}, "metrics")["loss"])


def test_nothing_is_no_values():
    assert validate_mapping(None, "params") == {}


@pytest.mark.parametrize(
    "value",
    [
        *(object(), b"bytes", {1, 2}, 1j, lambda: 0, np.array([object()])),
        *(np.clongdouble(1.5), BrokenTensor(1.0), BrokenTensor([1.0])),
    ],
)
def test_other_types_are_a_type_error_that_names_the_key(value):
    with pytest.raises(TypeError, match=r"params\['model'\]\['layer'\]"):
        validate_mapping({"model": {"layer": value}}, "params")


def test_why_a_tensor_cannot_be_read_is_told():
    with pytest.raises(TypeError, match=r"params\['a'\] cannot be read: RuntimeError: device lost"):
        validate_mapping({"a": BrokenTensor([1.0])}, "params")


def test_integers_without_bounds_are_refused_with_the_key():
    for value in (10**5000, -(10**5000), [10**5000]):
        with pytest.raises(ValueError, match=r"params\['seed'\].* is an int of 16610 bits"):
            validate_mapping({"seed": value}, "params")


@pytest.mark.parametrize("values", [[], "text", 5])
def test_what_is_not_a_dict_is_a_type_error(values):
    with pytest.raises(TypeError, match="metrics must be a dict"):
        validate_mapping(values, "metrics")


def test_keys_that_are_not_text_are_refused():
    with pytest.raises(TypeError, match="keys of params must be str, not 1"):
        validate_mapping({1: 2}, "params")


@pytest.mark.parametrize("values", [{"\ud800": 1}, {"k": "\udcff"}])
def test_text_that_is_not_unicode_is_refused(values):
    with pytest.raises(ValueError, match="lone surrogate"):
        validate_mapping(values, "params")


def test_values_without_an_end_are_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match=f"nested deeper than {records.MAX_VALUE_DEPTH} levels"):
        validate_mapping({"k": endless}, "params")


@pytest.mark.parametrize(
    "value", ["x" * (2 << 20), list(range(10**6)), np.zeros((1000, 1000)), {str(n): n for n in range(10**6)}]
)
def test_bulk_is_refused_before_it_is_copied(value):
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        validate_mapping({"k": value}, "params")


@pytest.mark.parametrize(
    ("given", "step"), [(0, 0), (MAX_STEP, MAX_STEP), (np.int32(7), 7), (np.array(7), 7)]
)
def test_steps_are_whole_numbers(given, step):
    assert validate_step(given) == step


@pytest.mark.parametrize("step", [1.0, math.nan, "3", True, None, np.float64(1), [1], BrokenTensor(1)])
def test_steps_of_other_types_are_a_type_error(step):
    with pytest.raises(TypeError, match="step must be an int"):
        validate_step(step)


@pytest.mark.parametrize("step", [-1, MAX_STEP + 1, 2**64])
def test_steps_out_of_range_are_a_value_error_with_the_value(step):
    with pytest.raises(ValueError, match=str(step)):
        validate_step(step)


@pytest.mark.parametrize("pair", [("loss", "minimize"), ["loss", "minimize"]])
def test_a_primary_metric_is_a_name_and_a_goal(pair):
    assert validate_primary_metric(pair, {"loss": 1}) == PrimaryMetric("loss", "minimize")
    assert validate_primary_metric(None, {"loss": 1}) is None


@pytest.mark.parametrize(
    "pair", ["loss", ("loss",), ("loss", "minimize", 1), {"loss": "minimize"}, (1, "minimize")]
)
def test_a_primary_metric_of_another_form_is_a_type_error(pair):
    with pytest.raises(TypeError, match="primary_metric"):
        validate_primary_metric(pair, {"loss": 1})


@pytest.mark.parametrize("goal", ["Minimize", "min", ""])
def test_a_goal_that_is_none_is_refused(goal):
    with pytest.raises(ValueError, match='"minimize" or "maximize"'):
        validate_primary_metric(("loss", goal), {"loss": 1})


def test_a_primary_metric_must_be_among_the_metrics():
    with pytest.raises(ValueError, match=r"'lose', which is not in metrics \(there: accuracy, loss\)"):
        validate_primary_metric(("lose", "minimize"), {"loss": 1, "accuracy": 2})


def test_tags_are_words_without_repetition():
    assert validate_tags(["b", "a", "b"]) == ("b", "a")


@pytest.mark.parametrize("tags", ["word", 5, [1], None])
def test_tags_of_other_types_are_a_type_error(tags):
    with pytest.raises(TypeError, match="tags"):
        validate_tags(tags)


@pytest.mark.parametrize("tag", ["", "two words", "a/b", "a,b", "+a", "a\n"])
def test_tags_that_are_no_words_are_refused(tag):
    with pytest.raises(ValueError, match="a tag is a word"):
        validate_tags([tag])


def test_text_is_text():
    assert validate_text("name", "name") == "name"
    with pytest.raises(TypeError, match="name must be a str, not int"):
        validate_text(5, "name")


def test_text_is_a_plain_str():
    for text in (
        validate_text(Optimiser.ADAM, "name"),
        validate_tags([Optimiser.ADAM])[0],
        validate_primary_metric((Optimiser.ADAM, "minimize"), {"adam": 1}).name,
    ):
        assert (text, type(text)) == ("adam", str)


def test_the_memory_of_a_machine_has_a_short_name():
    assert records.System(memory_bytes=4096).memory == 4096
