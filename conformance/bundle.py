"""A bundle on disk: a case as plain files (BUNDLE.md). Reading it, and refusing one that is not whole.

Every bundle holds a copy of this file, which must run where there is NumPy and nothing else.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spec.errors import InputError

FORMAT, VERSION = "dlrm-bundle", 1
"""The version rises when a program that reads bundles, or writes results, would have to change."""

MANIFEST, CHECKSUM, RESULTS = "manifest.json", "manifest.sha256", "results"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has the checksum that the manifest states."""

    folder: Path
    manifest: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """An array of the bundle, by its path within the folder."""
        return np.load(self.folder / name, allow_pickle=False)

    def result_folders(self) -> list[Path]:
        """The folder of each program's results, by name. Raises InputError where there is none."""
        results = self.folder / RESULTS
        folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
        if not folders:
            raise InputError(str(results), "a folder for each program's results", "none",
                             f"see {self.folder / 'BUNDLE.md'} for what to write there")
        return folders


def open_bundle(folder: Path) -> Bundle:
    """Read the manifest and check every file against it.

    Raises InputError, naming the file, for one that is missing, too many, of another length or content, and for
    a bundle of another version.
    """
    manifest = _read_manifest(folder)
    listed = manifest["files"]
    for name, facts in listed.items():
        path = folder / name
        if not path.is_file():
            raise _broken(path, "a file of the bundle", "none")
        if path.stat().st_size != facts["bytes"]:
            raise _broken(path, f"{facts['bytes']:,} bytes", f"{path.stat().st_size:,}")
        found = sha256(path)
        if found != facts["sha256"]:
            raise _broken(path, f"SHA-256 {facts['sha256'][:16]}...", f"{found[:16]}...")
    own = {MANIFEST, CHECKSUM, *listed}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in own and not name.startswith(f"{RESULTS}/"):
            raise InputError(str(path), "only files that the manifest lists", "another file",
                             f"remove it, or move it to {folder / RESULTS}/NAME if it is a result")
    return Bundle(folder, manifest)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path, checksum = folder / MANIFEST, folder / CHECKSUM
    for needed in (path, checksum):
        if not needed.is_file():
            raise InputError(str(needed), "a file of the bundle", "none",
                             "name a folder that 'dlrm conform SPEC --write-bundle' made")
    found = sha256(path)
    if checksum.read_bytes() != f"{found}  {MANIFEST}\n".encode():
        raise _broken(path, f"the SHA-256 that {CHECKSUM} states", f"{found[:16]}...")
    try:
        manifest = json.loads(path.read_bytes())
        named, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, "a bundle's manifest", f"something else ({type(error).__name__})") from None
    if (named, version) != (FORMAT, VERSION):
        raise InputError(str(path), f"{FORMAT} version {VERSION}", f"{named} version {version}",
                         "judge it with the suite that wrote it, or write it again with this one")
    return manifest


def _broken(path: Path, expected: str, found: str) -> InputError:
    return InputError(str(path), expected, found, "the bundle was changed or cut short: fetch or write it again")
