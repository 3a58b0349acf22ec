"""Making a failing example smaller, at the level of the spec: one simplification after another."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from conformance.generate import Data, Example
from spec.model import MLP, Interaction, Loss, Optimizer, Table

MOST_TRIES = 300


def shrink(example: Example, fails: Callable[[Example], bool], tries: int = MOST_TRIES) -> Example:
    """The smallest example found that `fails` too. Of a smallest one no single simplification fails any more, unless
    the tries ran out."""
    smaller = _simpler(example)
    while tries and (candidate := next(smaller, None)) is not None:
        tries -= 1
        if fails(candidate):
            example, smaller = candidate, _simpler(candidate)
    return example


def _simpler(example: Example) -> Iterator[Example]:
    """Simplifications of an example, those that take away most first. Each makes something smaller or plainer and
    nothing larger, so that there is an end."""
    spec = example.spec
    for tables in _fewer(spec.tables):
        yield _with(example, tables=tables)
    for size in _less(spec.batch_size):
        yield _with(example, batch_size=size)
    for mlp in ("bottom", "top"):
        *hidden, last = getattr(spec, mlp).widths
        for widths in _fewer(tuple(hidden), least=0):
            yield _with(example, **{mlp: {"widths": (*widths, last)}})
        for layer, width in enumerate(hidden):
            for less in _less(width):
                yield _with(example, **{mlp: {"widths": (*hidden[:layer], less, *hidden[layer + 1:], last)}})
    for size in _less(spec.dense_features):
        yield _with(example, dense_features=size)
    for size in _less(spec.embedding_dim):
        yield _with(example, embedding_dim=size, bottom={"widths": (*spec.bottom.widths[:-1], size)})
    plain = {"interaction": Interaction(kind="cat"), "loss": Loss(kind="mse"), "optimizer": Optimizer(),
             "bottom": MLP(widths=spec.bottom.widths), "top": MLP(widths=spec.top.widths)}
    for part, plainest in plain.items():
        yield from _plainer(example, part, getattr(spec, part), plainest)
    for number, table in enumerate(spec.tables):
        for changed in _simpler_tables(table):
            yield _with(example, tables=(*spec.tables[:number], changed, *spec.tables[number + 1:]))
    for field in fields(Data):
        if getattr(example.data, field.name) != field.default:
            yield replace(example, data=replace(example.data, **{field.name: field.default}))
    if example.seed:
        yield replace(example, seed=0)


def _with(example: Example, **changes: Any) -> Example:
    """With these keys of the spec changed; a dictionary changes keys of a part."""
    parts = {key: getattr(example.spec, key).model_copy(update=value) if isinstance(value, dict) else value
             for key, value in changes.items()}
    return replace(example, spec=example.spec.model_copy(update=parts))


def _fewer(items: tuple, least: int = 1) -> Iterator[tuple]:
    """One half, the other, then all but one."""
    half = len(items) // 2
    if half > 1:
        yield items[:half]
        yield items[half:]
    if len(items) > least:
        yield from (items[:i] + items[i + 1:] for i in reversed(range(len(items))))


def _less(size: int) -> Iterator[int]:
    yield from dict.fromkeys(smaller for smaller in (1, 2, size // 2, size - 1) if 0 < smaller < size)


def _plainer(example: Example, part: str, value: Any, plainest: Any) -> Iterator[Example]:
    """The plainest of its kind, else with one key at its default, if it is valid so."""
    if value == plainest:
        return
    yield _with(example, **{part: plainest})
    for key, field in type(value).model_fields.items():
        if not field.is_required() and getattr(value, key) != field.default:
            changed = value.model_dump() | {key: field.default}
            try:
                yield _with(example, **{part: type(value).model_validate(changed)})
            except ValueError:  # such as weights of wbce
                continue


def _simpler_tables(table: Table) -> Iterator[Table]:
    for rows in _less(table.rows):
        yield table.model_copy(update={"rows": rows})
    if table.pooling != "sum":
        yield table.model_copy(update={"pooling": "sum"})
    if table.lookups != 1:
        yield table.model_copy(update={"lookups": 1})
    if isinstance(table.lookups, tuple):
        low, high = table.lookups
        yield from (table.model_copy(update={"lookups": (min(low, less), less)}) for less in _less(high))
        yield table.model_copy(update={"lookups": high})
    else:
        yield from (table.model_copy(update={"lookups": less}) for less in _less(table.lookups))

