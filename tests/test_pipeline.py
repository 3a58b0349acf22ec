"""Judging beside making: order, errors, and that the two do run at once."""

import threading
from collections.abc import Iterator

import pytest

from conformance.pipeline import pipelined


def broken_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("the engine died")


def noted(made: list[int]) -> Iterator[int]:
    """0 to 4, each put down as it is made."""
    for number in range(5):
        made.append(number)
        yield number


def test_judgements_come_in_order():
    assert list(pipelined(iter(range(5)), lambda x: x * x)) == [0, 1, 4, 9, 16]
    assert list(pipelined(iter(()), lambda x: x)) == []


def test_the_next_is_made_while_one_is_judged():
    made = threading.Event()

    def making() -> Iterator[int]:
        yield 0
        made.set()
        yield 1

    assert list(pipelined(making(), lambda x: made.wait(60))) == [True, True]


def test_no_more_than_one_is_made_ahead():
    made: list[int] = []
    for judged in pipelined(noted(made), lambda x: x):
        assert made[-1] <= judged + 1


def test_who_stops_listening_stops_the_making():
    made: list[int] = []
    for judged in pipelined(noted(made), lambda x: x):
        if judged == 1:
            break
    assert made == [0, 1, 2]


def test_an_error_of_the_next_comes_after_the_judgements():
    judged = []
    with pytest.raises(ValueError, match="the engine died"):
        for judgement in pipelined(broken_after(2), str):
            judged.append(judgement)
    assert judged == ["0", "1"]


def test_an_error_of_the_judge_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(pipelined(iter([1, 0]), lambda x: 1 / x))
