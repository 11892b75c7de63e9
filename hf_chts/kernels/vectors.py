"""Pieces of loops that LLVM is given as vectors, because it does not find them by itself.

Addresses are integers. Vectors are of any width: LLVM splits them into what the processor has, AVX2, AVX-512 or NEON.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

FLOAT, INT8, INT16 = ir.FloatType(), ir.IntType(8), ir.IntType(16)
INT32, INT64 = ir.IntType(32), ir.IntType(64)


def vector(kind: Any, width: int) -> Any:
    return ir.VectorType(kind, width)


def splat(kind: Any, value: Any) -> Any:
    """A constant vector of this type."""
    return ir.Constant(kind, [value] * kind.count)


def at(builder: Any, base: Any, index: Any, scale: int) -> Any:
    """base + index · scale, an address."""
    return builder.add(base, builder.mul(index, ir.Constant(INT64, scale)))


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = align
    return found


def store(builder: Any, value: Any, address: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def multiply_add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    """one · other + total, in one instruction where there is one."""
    name = f"llvm.fma.v{total.type.count}f32"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(total.type, [total.type] * 3), name)
    return builder.call(function, [one, other, total])


def loop(builder: Any, count: Any, carried: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> Any:
    """`count` rounds of `body(round, carried)`, which gives what the next round gets; the last round's is returned."""
    before, function = builder.block, builder.function
    inside, after = function.append_basic_block("loop"), function.append_basic_block("after")
    zero, one = ir.Constant(INT64, 0), ir.Constant(INT64, 1)
    builder.cbranch(builder.icmp_signed(">", count, zero), inside, after)
    builder.position_at_end(inside)
    number = builder.phi(INT64)
    here = [builder.phi(value.type) for value in carried]
    given = body(number, here)
    following, end = builder.add(number, one), builder.block
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    number.add_incoming(zero, before)
    number.add_incoming(following, end)
    builder.position_at_end(after)
    results = []
    for phi, first, last in zip(here, carried, given, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, end)
        result = builder.phi(first.type)
        result.add_incoming(first, before)
        result.add_incoming(last, end)
        results.append(result)
    return results
