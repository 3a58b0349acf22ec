"""Rows of Criteo's click logs (SPEC.md, 8).

A row is a label, 13 integers and 26 hexadecimal ids, tab-separated, without a header; an empty field is a
missing value. Preprocessing as in Naumov et al. 2019, section 4: missing is 0, dense features are log(1 + x).
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from spec.batch import Batch
from spec.errors import InputError
from spec.model import ModelSpec

DENSE, TABLES = 13, 26
FIELDS = 1 + DENSE + TABLES

_LABEL, _INTEGER, _ID = rb"[01]", rb"(?:-?[0-9]{1,18})?", rb"[0-9a-fA-F]{0,8}"
_ROW = re.compile(rb"%b(?:\t%b){13}(?:\t%b){26}" % (_LABEL, _INTEGER, _ID))


def criteo_batches(spec: ModelSpec, path: Path, size: int) -> Iterator[Batch]:
    """Batches of `size` rows in the order of the file, without end.

    The last batch of the file may be smaller; after it the file starts again from the top.

    Raises InputError at the call where the spec is not one for Criteo's features or the file is missing, and
    from the iterator where it is empty and, as FILE:LINE, for a row that is not of the format.
    """
    if spec.dense_features != DENSE:
        raise InputError("dense_features", f"{DENSE}, as in Criteo's rows", spec.dense_features,
                         "use a spec for Criteo, for example criteo-kaggle")
    if len(spec.tables) != TABLES:
        raise InputError("tables", f"{TABLES}, as in Criteo's rows", len(spec.tables),
                         "use a spec for Criteo, for example criteo-kaggle")
    for number, table in enumerate(spec.tables):
        # a ragged table may hold bags of one row too
        if table.fixed_lookups not in (1, None):
            raise InputError(f"tables.{number}.lookups", "1: Criteo's rows hold one id for each table",
                             table.fixed_lookups, "use a spec for Criteo, for example criteo-kaggle")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(str(path), "a readable file of rows", error.strerror, "check the path") from None
    return _cycle(spec, path, size)


def _cycle(spec: ModelSpec, path: Path, size: int) -> Iterator[Batch]:
    rows = np.array([table.rows for table in spec.tables])
    while True:
        with path.open("rb") as file:
            start = 0
            while lines := list(islice(file, size)):
                batch = _parse(lines, rows, f"{path}", start + 1)
                batch.validate(spec)
                yield batch
                start += len(lines)
        if start == 0:
            raise InputError(str(path), "at least one row", "an empty file", "is the download complete?")


def _parse(lines: list[bytes], rows_T: np.ndarray, path: str, first: int) -> Batch:
    labels, integers, ids = [], [], []
    for number, raw in enumerate(lines, first):
        line = raw.rstrip(b"\r\n")
        if not _ROW.fullmatch(line):
            raise _row_error(line, f"{path}:{number}")
        fields = line.split(b"\t")
        labels.append(fields[0] == b"1")
        integers.append([int(field or b"0") for field in fields[1:1 + DENSE]])
        ids.append([int(field or b"0", 16) for field in fields[1 + DENSE:]])
    dense_BD = np.log1p(np.maximum(np.array(integers), 0)).astype(np.float32)
    indices_TB = np.ascontiguousarray((np.array(ids) % rows_T).T)
    ones_B = np.ones(len(lines), np.int32)
    return Batch(dense_BD, tuple(indices_TB), (ones_B,) * TABLES, np.array(labels, np.float32).reshape(-1, 1))


def _row_error(line: bytes, where: str) -> InputError:
    """Why a line does not match _ROW."""
    fields = line.split(b"\t")
    if len(fields) != FIELDS:
        return InputError(where, f"{FIELDS} tab-separated fields: label, {DENSE} integers, {TABLES} ids",
                          len(fields), "mend or remove the row")
    kinds = [(_LABEL, "a label, 0 or 1"), *[(_INTEGER, "an integer or nothing")] * DENSE,
             *[(_ID, "a hexadecimal id of at most 8 digits or nothing")] * TABLES]
    number = next(n for n, (field, (pattern, _)) in enumerate(zip(fields, kinds, strict=True))
                  if not re.fullmatch(pattern, field))
    return InputError(f"{where}: field {number + 1}", kinds[number][1],
                      repr(fields[number][:40].decode(errors="replace")), "mend or remove the row")
