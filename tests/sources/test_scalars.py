"""Values on the command line are read as YAML 1.2 reads them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_doctor.sources.scalars import parse_assignments, parse_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("8", 8),
        ("-3", -3),
        ("+3", 3),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("ppo", "ppo"),
        ("'8'", "8"),
        ('"true"', "true"),
        ("yes", "yes"),
        ("off", "off"),
        ("tRue", "tRue"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        (".", "."),
        ("reinforce++", "reinforce++"),
    ],
)
def test_scalar(text: str, value: object) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number() -> None:
    parsed = parse_scalar(".nan")
    assert isinstance(parsed, float)
    assert math.isnan(parsed)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back(number: float) -> None:
    assert parse_scalar(repr(number)) == number


@given(st.text())
def test_any_text_is_some_value(text: str) -> None:
    assert parse_scalar(text) is None or isinstance(parse_scalar(text), (bool, int, float, str))


def test_assignments_keep_equals_signs_of_the_value_and_the_last_wins() -> None:
    assert parse_assignments(["gamma=0.9", "reference=a=b", "gamma=1.0"]) == {"gamma": 1.0, "reference": "a=b"}


@pytest.mark.parametrize("text", ["gamma", "=1", " =1"])
def test_assignment_without_name_or_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"as in gamma=0\.99"):
        parse_assignments([text])
