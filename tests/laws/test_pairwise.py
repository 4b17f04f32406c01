"""What ``make test`` leaves out of products of parameters holds no pair of values that it does not run."""

import itertools
from types import SimpleNamespace

import pytest
from pairwise import covering, pairwise, select, singly

LISTS = [("a", "b", "c", "d"), (1, 2, 3), (None, 0.5), (False, True)]


def pairs(rows):
    """Every value of every column, and every pair of values of two columns."""
    return {found for row in rows for n in (1, 2) for found in itertools.combinations(enumerate(row), n)}


@pytest.mark.parametrize("n", range(1, 5))
def test_rows_hold_every_pair_of_the_product(n):
    rows, product = pairwise(*LISTS[:n]), list(itertools.product(*LISTS[:n]))
    assert pairs(rows) == pairs(product)
    assert set(rows) <= set(product)
    assert len(rows) == [4, 12, 12, 13][n - 1]


def test_rows_that_need_not_be_a_whole_product_keep_their_pairs():
    rows = [("x", 1, True), ("x", 2, True), ("x", 1, False), ("y", 2, False), ("y", 2, True), ("x", 2, False)]
    kept = [rows[k] for k in covering(rows)]
    assert pairs(kept) == pairs(rows)
    assert len(kept) < len(rows)


@pytest.mark.parametrize("seed", ["", "a", "b"])
def test_rows_of_every_value_are_as_many_as_the_longest_list_has(seed):
    rows = list(itertools.product(*LISTS))
    kept = [rows[k] for k in covering(rows, 1, seed)]
    assert [set(column) for column in zip(*kept, strict=True)] == [set(values) for values in LISTS]
    assert len(kept) == 4


def test_rows_in_step_hold_every_value():
    rows = singly(*LISTS)
    assert [set(column) for column in zip(*rows, strict=True)] == [set(values) for values in LISTS]
    assert len(rows) == 4


def item(name, marked, **params):
    """An item of pytest as far as the choice reads it: ``x`` and ``y`` come from one mark, ``z`` from a fixture."""
    marks = [SimpleNamespace(args=(names,)) for names in ("x, y", ["w"])]
    return SimpleNamespace(
        nodeid=f"test_{name}[{'-'.join(map(str, params.values()))}]",
        callspec=SimpleNamespace(params=params),
        iter_markers=lambda _: marks,
        get_closest_marker=lambda mark: mark == "pairwise" and marked,
    )


def plain(name, *marks):
    """An item without parameters."""
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: mark in marks)


def product(name, marked):
    rows = itertools.product([(1, 1), (1, 2), (2, 2)], "abc", (False, True))
    return [item(name, marked, x=x, y=y, w=w, z=z) for (x, y), w, z in rows]


def test_only_tests_that_are_marked_are_thinned():
    items = [*product("thinned", True), *product("whole", False), plain("test_plain")]
    every = list(items)
    assert select(items, "all") == []
    assert items == every
    dropped = select(items, "")
    assert [i for i in every if i in items] == items
    assert len(items) == 9 + 18 + 1
    assert all(i.nodeid.startswith("test_thinned") for i in dropped)
    rows, kept = (
        [((p["x"], p["y"]), p["w"], p["z"]) for i in of if "thinned" in i.nodeid for p in [i.callspec.params]]
        for of in (every, items)
    )
    assert pairs(kept) == pairs(rows)


def test_the_parts_are_what_the_pairs_leave_out():
    dropped = select(product("thinned", True), "")
    found = []
    for k in (1, 2, 3):
        items = [*product("thinned", True), *product("whole", False)]
        select(items, f"{k}/3")
        found += items
    assert sorted(i.nodeid for i in found) == sorted(i.nodeid for i in dropped)


def test_what_is_marked_rest_is_left_to_the_parts():
    def names(products):
        items = [plain("test_a"), plain("test_b", "rest")]
        select(items, products)
        return [item.nodeid for item in items]

    assert names("") == names("values") == ["test_a"]
    assert names("1/1") == ["test_b"]
    assert names("all") == ["test_a", "test_b"]
