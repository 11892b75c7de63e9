"""Where nothing can be written, loops are compiled and not kept."""

import importlib

import pytest

pytest.importorskip("numba")


def test_loops_without_a_folder_to_keep_them(monkeypatch):
    from numba.core.caching import CacheImpl

    from hf_chts.kernels import lane_products, link_loops, threads

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        threads.cfunc("void(voidptr)", cache=True)(lambda data: None)
    assert threads.compiled(lambda data: None).address
    assert link_loops.gather.__wrapped__(False)
    assert importlib.reload(lane_products).products.address
