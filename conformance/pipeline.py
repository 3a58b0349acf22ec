"""Judging while the backend goes on: two cores have something to do."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")
Judged = TypeVar("Judged")


def pipelined(making: Iterator[Made], judge: Callable[[Made], Judged]) -> Iterator[Judged]:
    """`judge` of each, in a thread, while the next one is being made here: never more than one ahead.

    Where making one raises, the judgements of all before it come first. Whoever stops listening stops the making.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Judged] | None = None
        while True:
            error = None
            try:
                made = next(making)
            except Exception as raised:  # StopIteration too
                error = raised
            if waiting:
                yield waiting.result()
            if isinstance(error, StopIteration):
                return
            if error:
                raise error
            waiting = pool.submit(judge, made)
