"""Specs as TOML files: the shipped presets and the user's own; their JSON Schema."""

import difflib
import itertools
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from spec.errors import InputError
from spec.files import write_text
from spec.model import MLP, Interaction, Loss, ModelSpec, Optimizer, Table


def preset_names() -> tuple[str, ...]:
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in files("spec").joinpath("presets").iterdir()
                        if entry.name.endswith(".toml")))


def load(name_or_path: str) -> ModelSpec:
    """A preset by name, or a TOML file by path (it ends in .toml). Raises InputError naming path and key."""
    if name_or_path.endswith(".toml"):
        try:
            return loads(Path(name_or_path).read_text(encoding="utf-8"), name_or_path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(name_or_path, "a readable TOML file", getattr(error, "strerror", None) or error,
                             "check the path") from None
    if name_or_path not in preset_names():
        close = difflib.get_close_matches(name_or_path, preset_names(), 1)
        hint = f"did you mean '{close[0]}'?" if close else "see 'dlrm spec list'"
        raise InputError(f"spec '{name_or_path}'", f"one of {', '.join(preset_names())}, or a .toml file",
                         "no such preset", hint)
    return loads(files("spec").joinpath(f"presets/{name_or_path}.toml").read_text(encoding="utf-8"), name_or_path)


def loads(text: str, path: str) -> ModelSpec:
    """Parse and validate; `path` names the text in errors."""
    try:
        return ModelSpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(path, "TOML", error, "mend the syntax") from None
    except ValidationError as error:
        raise _input_error(error).within(path) from None


def dumps(spec: ModelSpec) -> str:
    """TOML that `loads` reads back to an equal spec; tables that differ only in their rows share an entry."""
    content = spec.model_dump(mode="json", exclude_none=True, exclude={"tables"})
    alike = itertools.groupby(
        spec.tables, key=lambda t: (t.pooling, t.lookups, t.published_rows is None))
    content["tables"] = [_table_entry(list(group)) for _, group in alike]
    return tomli_w.dumps(content)


def save(spec: ModelSpec, path: Path) -> None:
    write_text(path, dumps(spec))


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a spec file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ModelSpec.model_json_schema()}


def _table_entry(tables: list[Table]) -> dict[str, Any]:
    entry = tables[0].model_dump(mode="json", exclude_none=True)
    if len(tables) > 1:
        for key in ("rows", "published_rows"):
            if key in entry:
                entry[key] = [getattr(table, key) for table in tables]
    return entry


_KEYS = sorted({key for model in (ModelSpec, Table, MLP, Interaction, Loss, Optimizer) for key in model.model_fields})


def _input_error(error: ValidationError) -> InputError:
    """The first thing that pydantic found, in our words; a misspelt key before the one it leaves missing."""
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"]) or "spec"
    if first["type"] == "mismatch":
        context = first["ctx"]
        inner = ".".join(str(part) for part in (*first["loc"], context["where"]) if part != "")
        return InputError(inner, context["expected"], context["found"], context["remedy"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), _KEYS, 1)
        return InputError(where, "only known keys", "an unknown key",
                          f"did you mean '{close[0]}'?" if close else "remove it, or see 'dlrm spec schema'")
    if first["type"] == "missing":
        return InputError(where, "a value", "none", "add the key")
    expected = re.sub(r"^\w+ should (be |have |match )?| after validation.*$", "", first["msg"])
    return InputError(where, expected, repr(first["input"])[:80], "see 'dlrm spec schema'")
