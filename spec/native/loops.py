"""Loops compiled by Numba, run by the very threads that a framework's own kernels run on.

Numba's threads would be a second pool: idle OpenMP threads spin, on the cores that the others need. So a loop is a C
function for `GOMP_parallel`, by which compilers start an OpenMP region. The threads take turns, the next one each,
until none is left; which thread takes which turn must make no difference to what the loop computes.

Numba compiles a loop when its module is first imported, for seconds, and keeps the code in __pycache__ or in the user's
cache folder. It looks at changes of the loop's own file alone, and at the types that a loop takes: what this package
holds is in a name there (`DIGEST`).
"""

import ctypes
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

DIGEST = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:16]
"""Of all that a loop may call from here: where it changes, no code is taken that Numba has kept."""

_READ_AND_WRITE, _ALL_CACHES, _DATA = 1, 3, 1  # arguments of llvm.prefetch


class Team:
    """The OpenMP threads that a shared library computes with.

    Args:
        library: a path of it, such as torch._C.__file__. It is loaded already.

    Where it was built without OpenMP, the calling thread takes all turns.
    """

    def __init__(self, library: str) -> None:
        self._parallel = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
        if self._parallel is not None:
            self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            self._parallel.restype = None

    def run(self, loop: "Loop", turns: int, threads: int, **values: float) -> None:
        """All turns of a loop, by so many threads at the most. `values` are its fields; addresses are of memory that
        outlives the call."""
        # Bytes that nobody else has: the threads count the turns in them.
        arguments = loop.pack(0, turns, *map(values.__getitem__, loop.fields))
        if self._parallel is None or threads == 1 or turns == 1:
            loop.call(arguments)
        else:
            self._parallel(loop.address, arguments, min(threads, turns), 0)


class Loop:
    """A function of a pointer to its arguments, compiled.

    Attributes:
        fields: names of its arguments.
        pack: the next turn, the number of turns, and the arguments -> a record of them.
    """

    def __init__(self, function: Callable[[Any], None], fields: dict[str, type]) -> None:
        self.fields = tuple(fields)
        # The next turn is found by its place, whatever its name.
        codes = {f"turn_{DIGEST}": "q", "turns": "q"}
        codes |= {name: "d" if kind is float else "q" for name, kind in fields.items()}
        self.pack = struct.Struct("=" + "".join(codes.values())).pack
        record = numba.from_dtype(np.dtype([(name, f"={code}") for name, code in codes.items()]))
        signature = types.void(types.CPointer(record))
        try:
            compiled = numba.cfunc(signature, cache=True)(function)
        except RuntimeError:  # neither folder can be written to
            compiled = numba.cfunc(signature)(function)
        self._compiled = compiled  # which owns the code
        self.address, self.call = compiled.address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def loop(**fields: type) -> Callable[[Callable[[Any], None]], Loop]:
    """Decorates a function that takes a pointer, reads `carray(pointer, 1)[0]` and works while `turn(pointer)` is below
    `.turns`. Fields are int, which addresses are too, or float."""
    return lambda function: Loop(function, fields)


@intrinsic
def turn(context, pointer):
    """The next one, counted from 0; each is given out once."""
    def generate(context, builder, signature, arguments):
        number = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", number, ir.IntType(64)(1), "monotonic")
    return types.int64(pointer), generate


@intrinsic
def _pointer(context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))
    return types.voidptr(types.int64), generate


@intrinsic
def _prefetch(context, address):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(
            ir.VoidType(), [pointer.type, number, number, number]), "llvm.prefetch.p0")
        builder.call(function, [pointer, number(_READ_AND_WRITE), number(_ALL_CACHES), number(_DATA)])
        return context.get_dummy_value()
    return types.void(types.int64), generate


@njit(forceinline=True)
def prefetch(address, size):
    """Begin to fetch so many bytes, which are soon to be read and written."""
    fours = size & -256
    for line in range(0, fours, 256):
        _prefetch(address + line)
        _prefetch(address + line + 64)
        _prefetch(address + line + 128)
        _prefetch(address + line + 192)
    for line in range(fours, size, 64):
        _prefetch(address + line)


@njit
def int32s(address, count):
    return carray(_pointer(address), count, np.int32)


@njit
def int64s(address, count):
    return carray(_pointer(address), count, np.int64)


@njit
def float32s(address, count):
    return carray(_pointer(address), count, np.float32)


@njit
def float64s(address, count):
    return carray(_pointer(address), count, np.float64)
