"""Numbers below the normal ones, which processors take a hundred times as long for, are taken for 0 in a loop.

`flush(0)` has this thread do so from here on and gives the state before, for `restore`.
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _control(change: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def control(typingctx: Any, argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return change(builder, arguments[0], platform.machine().lower())

        return types.int64(types.int64), generate

    return control


def _write_control(builder: Any, state: Any, machine: str) -> None:
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, _I32)
        builder.store(builder.trunc(state, _I32), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", place)
    elif machine in ("aarch64", "arm64"):
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(ir.InlineAsm(kind, "msr fpcr, $0", "r", side_effect=True), [state])


def _flush(builder: Any, argument: Any, machine: str) -> Any:
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, _I32)
        _call(builder, "llvm.x86.sse.stmxcsr", place)
        before, bits = builder.zext(builder.load(place), _I64), 0x8040
    elif machine in ("aarch64", "arm64"):
        kind = ir.FunctionType(_I64, [])
        before, bits = builder.call(ir.InlineAsm(kind, "mrs $0, fpcr", "=r", side_effect=True), []), 1 << 24
    else:
        return ir.Constant(_I64, 0)
    _write_control(builder, builder.or_(before, ir.Constant(_I64, bits)), machine)
    return before


def _restore(builder: Any, argument: Any, machine: str) -> Any:
    _write_control(builder, argument, machine)
    return argument


def _call(builder: Any, name: str, place: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer]), name)
    builder.call(function, [builder.bitcast(place, pointer)])


flush, restore = _control(_flush), _control(_restore)
