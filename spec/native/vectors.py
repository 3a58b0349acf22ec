"""16 float32 numbers at a time, for compiled loops: what Numba does not vectorise by itself, since it cannot know that
what is written is not what is read next.

`n` is how many numbers there are from an address on: of fewer than 16 the rest is 0, and is not written.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
STEP = 4 * LANES
"""Bytes from one vector to the next."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_ALIGNMENT = 4


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type) -> None:
        super().__init__(manager, type, _FLOATS)


_VECTOR = Vector()


def _call(builder, name, result, arguments, **flags):
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [argument.type for argument in arguments]), f"llvm.{name}")
    return builder.call(function, arguments, **flags)


def _at(builder, address):
    return builder.inttoptr(address, _FLOATS.as_pointer())


def _same(builder, number, type):
    """A vector of this number."""
    first = builder.insert_element(ir.Constant(type, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(type, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _mask(builder, n):
    count = _same(builder, builder.trunc(n, ir.IntType(32)), _INTS)
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), count)


@intrinsic
def _load(context, address):
    def generate(context, builder, signature, arguments):
        result = builder.load(_at(builder, arguments[0]), typ=_FLOATS)
        result.align = _ALIGNMENT
        return result
    return _VECTOR(types.int64), generate


@intrinsic
def _load_part(context, address, n):
    def generate(context, builder, signature, arguments):
        pointer = _at(builder, arguments[0])
        return _call(builder, "masked.load.v16f32.p0", _FLOATS, [
            pointer, ir.IntType(32)(_ALIGNMENT), _mask(builder, arguments[1]), ir.Constant(_FLOATS, None)])
    return _VECTOR(types.int64, types.int64), generate


@intrinsic
def _store(context, address, x):
    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], _at(builder, arguments[0])).align = _ALIGNMENT
        return context.get_dummy_value()
    return types.void(types.int64, _VECTOR), generate


@intrinsic
def _store_part(context, address, x, n):
    def generate(context, builder, signature, arguments):
        address, x, n = arguments
        _call(builder, "masked.store.v16f32.p0", ir.VoidType(), [
            x, _at(builder, address), ir.IntType(32)(_ALIGNMENT), _mask(builder, n)])
        return context.get_dummy_value()
    return types.void(types.int64, _VECTOR, types.int64), generate


@intrinsic
def _splat(context, number):
    def generate(context, builder, signature, arguments):
        return _same(builder, arguments[0], _FLOATS)
    return _VECTOR(types.float32), generate


@njit(forceinline=True)
def load(address, n):
    if n >= LANES:
        return _load(address)
    return _load_part(address, n)


@njit(forceinline=True)
def store(address, x, n):
    if n >= LANES:
        _store(address, x)
    else:
        _store_part(address, x, n)


@njit(forceinline=True)
def _add_scaled(to, factor, source):
    _store(to, fma(factor, _load(source), _load(to)))


@njit(forceinline=True)
def add_scaled(to, factor, source, size):
    """to += factor * source, for so many bytes at each of two addresses."""
    fours, whole = size & -(4 * STEP), size & -STEP
    for e in range(0, fours, 4 * STEP):
        _add_scaled(to + e, factor, source + e)
        _add_scaled(to + e + STEP, factor, source + e + STEP)
        _add_scaled(to + e + 2 * STEP, factor, source + e + 2 * STEP)
        _add_scaled(to + e + 3 * STEP, factor, source + e + 3 * STEP)
    for e in range(fours, whole, STEP):
        _add_scaled(to + e, factor, source + e)
    if whole < size:
        n = (size - whole) // 4
        _store_part(to + whole, fma(factor, _load_part(source + whole, n), _load_part(to + whole, n)), n)


@njit(forceinline=True)
def splat(number):
    """It 16 times."""
    return _splat(np.float32(number))


@intrinsic
def fma(context, x, y, z):
    """x y + z, rounded once where the processor can."""
    def generate(context, builder, signature, arguments):
        return _call(builder, "fmuladd.v16f32", _FLOATS, arguments)
    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


@intrinsic
def sqrt(context, x):
    def generate(context, builder, signature, arguments):
        return _call(builder, "sqrt.v16f32", _FLOATS, arguments)
    return _VECTOR(_VECTOR), generate


@intrinsic
def total(context, x):
    """The sum, a float32."""
    def generate(context, builder, signature, arguments):
        return _call(builder, "vector.reduce.fadd.v16f32", ir.FloatType(), [ir.FloatType()(0), *arguments],
                     fastmath=("reassoc",))
    return types.float32(_VECTOR), generate


@intrinsic
def where_not_positive(context, x, y, z):
    """y where x is 0 or less, z elsewhere: also where x is NaN."""
    def generate(context, builder, signature, arguments):
        x, y, z = arguments
        return builder.select(builder.fcmp_ordered("<=", x, ir.Constant(_FLOATS, [0.0] * LANES)), y, z)
    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


def _element_by_element(instruction):
    @intrinsic
    def apply(context, x, y):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)
        return _VECTOR(_VECTOR, _VECTOR), generate
    return apply


_add, _multiply, _divide = map(_element_by_element, ("fadd", "fmul", "fdiv"))


def _overload(symbol, apply):
    @overload(symbol)
    def of_vectors(x, y):
        if isinstance(x, Vector) and isinstance(y, Vector):
            return lambda x, y: apply(x, y)


_overload(operator.add, _add)
_overload(operator.mul, _multiply)
_overload(operator.truediv, _divide)
