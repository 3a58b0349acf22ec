"""Expected failures: a file that says which tensors of which backend do not conform yet, and why.

A partial or a work-in-progress port is judged whole; what its author knows to be wrong is listed, with the reason, and
reported as such. Everything else still fails the run, and so does an engine's error, which is no verdict.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from conformance.verdict import TensorVerdict
from spec.errors import InputError


@dataclass
class Entry:
    """Patterns with * and ?; what is left out matches everything. `phase` is forward, backward or update.

    Attributes:
        matched: tensors that it was asked about; failed: those of them that did not conform.
    """

    backend: str
    tensor: str
    reason: str
    preset: str = "*"
    phase: str = "*"
    optimizer: str = "*"
    matched: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """XPASS: something was judged that was expected to fail, and all of it conforms."""
        return bool(self.matched) and not self.failed


_KEYS = tuple(key.name for key in fields(Entry) if key.name not in ("matched", "failed"))
_NEEDED = _KEYS[:3]


@dataclass
class ExpectedFailures:
    """`strict`: an entry whose tensors all conform fails the run."""

    entries: list[Entry] = field(default_factory=list)
    strict: bool = False

    def mark(self, preset: str, backend: str, optimizer: str | None, verdicts: Iterable[TensorVerdict]) -> None:
        """Set `xfail` of each verdict that does not conform to the reason of the first entry that expects it."""
        for entry in self.entries:
            if not (fnmatchcase(backend, entry.backend) and fnmatchcase(preset, entry.preset)
                    and fnmatchcase(optimizer or "", entry.optimizer)):
                continue
            for verdict in verdicts:
                if fnmatchcase(verdict.tensor, entry.tensor) and fnmatchcase(verdict.phase, entry.phase):
                    entry.matched.append(verdict.tensor)
                    if not verdict.conforms:
                        entry.failed.append(verdict.tensor)
                        verdict.xfail = verdict.xfail or entry.reason

    @property
    def broken(self) -> bool:
        """Whether the run fails for want of a failure."""
        return self.strict and any(entry.passes for entry in self.entries)


def load_expected_failures(path: Path) -> ExpectedFailures:
    """Read a TOML file of [[xfail]] entries, and `strict`. Raises InputError naming the file and the key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), "a readable TOML file", getattr(error, "strerror", None) or error,
                         "check the path") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), "TOML", error, "mend the syntax") from None
    strict, entries = content.pop("strict", False), content.pop("xfail", [])
    for key in content:
        raise InputError(f"{path}: {key}", "only 'strict' and [[xfail]]", "an unknown key", "remove it")
    if not isinstance(strict, bool):
        raise InputError(f"{path}: strict", "true or false", repr(strict), "correct it")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: xfail", "[[xfail]] tables", type(entries).__name__, "write [[xfail]] above each")
    return ExpectedFailures([_entry(entry, f"{path}: xfail.{number}") for number, entry in enumerate(entries)], strict)


def _entry(content: dict[str, Any], where: str) -> Entry:
    for key in content.keys() - set(_KEYS):
        raise InputError(f"{where}.{key}", f"one of {', '.join(_KEYS)}", "an unknown key", "correct it")
    for key in _NEEDED:
        if key not in content:
            raise InputError(f"{where}.{key}", "a value", "none", f"every entry has {', '.join(_NEEDED)}")
    for key, value in content.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}.{key}", "text that says something", repr(value), "correct it")
    return Entry(**content)
