"""Runs numba's loops on torch's own threads.

A pool of numba's beside torch's would fight with it: the threads of each wait for their next work in a busy loop, on
the cores that the other needs. So a loop is handed to the OpenMP runtime that torch has loaded, and its threads, which
are awake and warm, take the chunks of work one after the other.

A loop is a C function that numba compiles, and gets the address of 64-bit words:

    words[0]  the next chunk, which threads count up together
    words[1]  the number of chunks
    words[2]  the number of threads that have come so far
    words[3:] what the loop is about: addresses, sizes

    @compiled
    def _double(data):
        words = carray(int64_at(words_of(data)), 6)
        values = carray(float32_at(words[3]), words[4])
        chunk = claim(data, 0)
        while chunk < words[1]:
            for i in range(chunk * words[5], min(words[4], (chunk + 1) * words[5])):
                values[i] *= 2
            chunk = claim(data, 0)

    run(_double.address, chunks, values.data_ptr(), values.numel(), size)
"""

import ctypes
import functools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

FIRST_ARGUMENT = 3
# numba's cache on disk knows a loop by its own file and by what its closure holds: loops name this, since they are made
# of what stands in other files of this folder
VERSION = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
_TEAM: Any = None


@intrinsic
def claim(typingctx: Any, data: Any, word: Any) -> Any:
    """Count a word up and return what it was before; no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counters = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        place = builder.gep(counters, [arguments[1]])
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr, types.intp), generate


@intrinsic
def words_of(typingctx: Any, data: Any) -> Any:
    """The address of a loop's words, as a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


def _pointer(dtype: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return pointer


# what is at an address, for numba's carray
float32_at, float64_at = _pointer(types.float32), _pointer(types.float64)
uint8_at, uint16_at, uint32_at, uint64_at = map(_pointer, (types.uint8, types.uint16, types.uint32, types.uint64))
int32_at, int64_at = _pointer(types.int32), _pointer(types.int64)


def compiled(function: Any, **options: Any) -> Any:
    """A loop, compiled, and kept on disk where there is a folder for it."""
    try:
        return cfunc("void(voidptr)", cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        return cfunc("void(voidptr)", **options)(function)


def run(loop: int, chunks: int, *arguments: int, threads: int | None = None) -> None:
    """Run a loop over its chunks, and return when all are done.

    Args:
        loop: the address of the C function.
        chunks: the number of chunks.
        arguments: the words from the fourth on; whoever calls keeps alive what they are addresses of.
        threads: at most so many; None: as many as torch has.
    """
    words = (ctypes.c_int64 * (FIRST_ARGUMENT + len(arguments)))(0, chunks, 0, *arguments)
    threads = min(chunks, torch.get_num_threads() if threads is None else threads)
    if threads <= 1:
        _function(loop)(ctypes.addressof(words))
    else:
        _team()(loop, ctypes.addressof(words), threads)


@functools.cache
def _function(loop: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loop)


@functools.cache
def _team() -> Any:
    runtime = _openmp()
    if runtime is not None:
        parallel = runtime.GOMP_parallel
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return lambda loop, words, threads: parallel(loop, words, threads, 0)
    return _on_pool


def _openmp() -> Any:
    """The OpenMP runtime that torch has loaded, if it has an entry for us."""
    for path in _loaded():
        name = os.path.basename(path)
        if "gomp" in name or "iomp" in name or "libomp" in name:
            try:
                library = ctypes.CDLL(path, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0))
                library.GOMP_parallel  # noqa: B018 - LLVM's runtime has the entry on some systems
            except (OSError, AttributeError):
                continue
            return library
    return None


def _loaded() -> list[str]:
    """The libraries of this process that torch has brought along, those in its folder first."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    found = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if "omp" in name]
    try:
        with open("/proc/self/maps") as maps:
            found += sorted({line.split()[-1] for line in maps if "omp" in line and "/" in line})
    except OSError:  # not Linux
        pass
    return found


def _on_pool(loop: int, words: int, threads: int) -> None:
    """The team where torch's runtime has no entry for us: threads of Python, which a call through ctypes sets free."""
    global _TEAM
    if _TEAM is None or _TEAM[0] != os.getpid():
        _TEAM = (os.getpid(), ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)))
    function = _function(loop)
    others = [_TEAM[1].submit(function, words) for _ in range(threads - 1)]
    function(words)
    for other in others:
        other.result()


@cfunc("void(voidptr)")
def _probe(data):  # type: ignore[no-untyped-def] # numba types it
    claim(data, 0)
    claim(data, 2)


@functools.cache
def works() -> bool:
    """Whether a loop runs on more than one thread and comes back."""
    words = (ctypes.c_int64 * 3)()
    _team()(_probe.address, ctypes.addressof(words), 2)
    return 1 <= words[2] <= 2
