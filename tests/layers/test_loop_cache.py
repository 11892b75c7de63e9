"""What numba keeps on disk of a loop: under a name that changes with what it is made of, or nothing."""

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


def test_loops_are_kept_for_what_they_are_made_of():
    from hf_chts.kernels import lane_products, link_loops, threads

    made = [lane_products.products, lane_products.dense_product]
    for loop, settings in (
        (link_loops.cut, (16, False)),
        (link_loops.uncut, (16, False)),
        (link_loops.multiply, (16, False, True)),
        (link_loops.sample_links, (16, False, True)),
        (link_loops.gather, (False,)),
        (link_loops.scatter, (False,)),
    ):
        assert loop.__wrapped__(*settings)  # anew, whatever this process has made before
        made.append(link_loops._KEPT[-1])
    for loop in made:
        held = [cell.cell_contents for cell in loop._pyfunc.__closure__]
        assert threads.VERSION in held
