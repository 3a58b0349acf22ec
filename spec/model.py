"""ModelSpec: everything that defines one DLRM, independent of any framework.

Source of the architecture: Naumov et al. 2019, sections 2 and 5. SPEC.md is the normative text.
"""

import hashlib
import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spec.errors import InputError

Size = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]

MOST_ROWS = 2**31
"""Indices are drawn from 32-bit words (SPEC.md, 7)."""


def _one_or_list(description: str) -> WithJsonSchema:
    size = {"type": "integer", "exclusiveMinimum": 0, "maximum": MOST_ROWS}
    return WithJsonSchema({"anyOf": [size, {"type": "array", "items": size, "minItems": 1}],
                           "description": description})


def _mismatch(where: str, expected: str, found: object, remedy: str) -> PydanticCustomError:
    """A rule between several keys was broken; spec.toml turns it into an InputError."""
    return PydanticCustomError(
        "mismatch", "{where}: expected {expected}, found {found}; {remedy}",
        {"where": where, "expected": expected, "found": str(found), "remedy": remedy})


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Table(_Frozen):
    """One embedding table [rows, embedding_dim] and how the rows of a bag are pooled."""

    rows: Annotated[Size, Field(le=MOST_ROWS), _one_or_list(
        "rows of the table; a list in the file makes one table of each number")]
    published_rows: Annotated[
        Size | None, Field(le=MOST_ROWS), _one_or_list("rows before they were capped")] = None
    pooling: Literal["sum", "mean", "weighted_fixed", "weighted_learned"] = "sum"
    lookups: Size | tuple[Count, Size] = Field(
        default=1, description="k: every bag holds exactly k rows (1 is one-hot); "
                               "[min, max]: bags are ragged, expected to hold min to max rows")

    @field_validator("lookups", mode="wrap")
    @classmethod
    def _in_one_of_its_forms(cls, value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        """Pydantic's own error would name a branch of the union, which is no key of the file."""
        try:
            return parse(value)
        except ValidationError:
            raise _mismatch("", "k, a whole number above 0, or [min, max] with min 0 or more", repr(value)[:80],
                            "lookups = 1 is one-hot") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.published_rows is not None and self.published_rows <= self.rows:
            raise _mismatch("published_rows", f"more than {self.rows}, the rows they were capped to",
                            self.published_rows, "remove the key where nothing was capped")
        if isinstance(self.lookups, tuple) and self.lookups[0] > self.lookups[1]:
            raise _mismatch("lookups", "[min, max] with min <= max", list(self.lookups), "swap the two")
        return self

    @property
    def fixed_lookups(self) -> int | None:
        """Rows in every bag, or None where bags are ragged."""
        return self.lookups if isinstance(self.lookups, int) else None

    @property
    def one_hot(self) -> bool:
        """Whether every bag holds one row."""
        return self.lookups == 1

    @property
    def weighted(self) -> bool:
        return self.pooling.startswith("weighted")


class MLP(_Frozen):
    """Fully connected layers; `activation` follows every layer, but a top MLP's last one (SPEC.md, 4)."""

    widths: Annotated[tuple[Size, ...], Field(min_length=1)]
    activation: Literal["relu", "sigmoid"] = "relu"


class Interaction(_Frozen):
    kind: Literal["dot", "cat"] = "dot"
    self_interaction: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "cat" and self.self_interaction:
            raise _mismatch("self_interaction", "false, since kind is 'cat'", "true", "remove the key")
        return self


class Loss(_Frozen):
    """Mean over the batch. `clip` c keeps the probability in [c, 1-c]; `weights` are those of class 0 and 1."""

    kind: Literal["mse", "bce", "bce_logits", "wbce"] = "bce"
    clip: Annotated[float, Field(ge=0, lt=0.5, strict=True)] = 0.0
    weights: tuple[Rate, Rate] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.clip and self.kind not in ("bce", "wbce"):
            raise _mismatch("clip", f"0, since kind is '{self.kind}'", self.clip,
                            "remove the key or use kind 'bce' or 'wbce'")
        if self.kind == "wbce" and self.weights is None:
            raise _mismatch("weights", "the weights of class 0 and class 1", "none",
                            "add weights = [1.0, 1.0]")
        if self.kind != "wbce" and self.weights is not None:
            raise _mismatch("weights", f"none, since kind is '{self.kind}'", list(self.weights),
                            "remove the key or use kind 'wbce'")
        return self


class Optimizer(_Frozen):
    kind: Literal["sgd", "adagrad", "rowwise_adagrad"] = "sgd"
    learning_rate: Rate = 0.1
    eps: Annotated[Rate, Field(description="added to the root; the Adagrads only")] = 1e-10


class ModelSpec(_Frozen):
    """One DLRM. Read it with `spec.toml.load`; `F` is interacting_vectors in SPEC.md's legend."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str = ""
    dense_features: Size
    embedding_dim: Size
    batch_size: Size = 128
    bottom: MLP
    top: MLP
    interaction: Interaction = Interaction()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    tables: Annotated[tuple[Table, ...], Field(min_length=1)]
    sources: Annotated[dict[str, str], Field(
        description="dotted key -> where its numbers were published")] = {}

    @model_validator(mode="before")
    @classmethod
    def _expand_tables(cls, data: Any) -> Any:
        """One [[tables]] entry may list the rows of many tables that are otherwise alike."""
        if not isinstance(data, dict) or not isinstance(data.get("tables"), list):
            return data
        expanded: list[Any] = []
        for number, entry in enumerate(data["tables"]):
            if not isinstance(entry, dict) or not isinstance(entry.get("rows"), list):
                expanded.append(entry)
                continue
            if not entry["rows"]:
                raise _mismatch(f"tables.{number}.rows", "a number, or a list of them", "an empty list",
                                "list the rows of each table")
            published = entry.get("published_rows", [None] * len(entry["rows"]))
            if not isinstance(published, list) or len(published) != len(entry["rows"]):
                raise _mismatch(f"tables.{number}.published_rows", f"{len(entry['rows'])} numbers, as in rows",
                                published, "list one number for each table")
            expanded += [{**entry, "rows": rows, "published_rows": before}
                         for rows, before in zip(entry["rows"], published, strict=True)]
        return {**data, "tables": expanded}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bottom.widths[-1] != self.embedding_dim:
            raise _mismatch("bottom.widths", f"a last width of {self.embedding_dim}, the embedding_dim",
                            self.bottom.widths[-1], "make the two equal: their vectors interact")
        if self.top.widths[-1] != 1:
            raise _mismatch("top.widths", "a last width of 1, the probability", self.top.widths[-1],
                            "end the list with 1")
        return self

    @property
    def interacting_vectors(self) -> int:
        """F: the dense vector and one pooled vector of each table."""
        return len(self.tables) + 1

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(i, j) of the dot interaction in the spec's order: i ascending, then j (SPEC.md, 3)."""
        if self.interaction.kind == "cat":
            return ()
        extra = 1 if self.interaction.self_interaction else 0
        return tuple((i, j) for i in range(self.interacting_vectors) for j in range(i + extra))

    @property
    def interaction_width(self) -> int:
        """Columns of `interaction.output`, the input of the top MLP."""
        if self.interaction.kind == "cat":
            return self.interacting_vectors * self.embedding_dim
        return self.embedding_dim + len(self.pairs)

    @property
    def layer_sizes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """(inputs, outputs) of every layer of "bottom" and "top"."""
        return {"bottom": tuple(itertools.pairwise((self.dense_features, *self.bottom.widths))),
                "top": tuple(itertools.pairwise((self.interaction_width, *self.top.widths)))}

    @property
    def is_capped(self) -> bool:
        return any(table.published_rows is not None for table in self.tables)

    def capped(self, max_rows: int) -> "ModelSpec":
        """The same model with at most `max_rows` rows a table; both numbers are kept.

        Raises InputError for less than one row.
        """
        if max_rows < 1:
            raise InputError("max rows", "1 or more", max_rows, "a table has at least one row")
        tables = tuple(
            table if table.rows <= max_rows else
            table.model_copy(update={"rows": max_rows, "published_rows": table.published_rows or table.rows})
            for table in self.tables)
        return self.model_copy(update={"tables": tables})

    def with_optimizer(self, kind: str, learning_rate: float) -> "ModelSpec":
        """The same model under another optimizer."""
        optimizer = Optimizer(kind=kind, learning_rate=learning_rate, eps=self.optimizer.eps)
        return self.model_copy(update={"optimizer": optimizer})

    @property
    def digest(self) -> str:
        """SHA-256 of what the model computes: its names and sources do not enter."""
        content = self.model_dump_json(exclude={"name", "description", "sources", "batch_size"})
        return hashlib.sha256(content.encode()).hexdigest()
