"""The fixed slice keeps groups whole, is nested, spread over strata, and never changes."""

import pytest

from harness.tasks.sampling import take


def test_groups_stay_whole_and_the_size_is_rounded_up():
    keys = [i // 4 for i in range(40)]  # groups of four, as MMBench's rotations
    rows = take(keys, [0] * 40, 5)
    assert len(rows) == 8
    assert sorted({keys[r] for r in rows}) == [keys[rows[0]], keys[rows[4]]]
    assert all([k * 4 + i in rows for i in range(4)] == [True] * 4 for k in {keys[r] for r in rows})


def test_slices_are_nested_and_ascending():
    keys, strata = list(range(100)), [i % 7 for i in range(100)]
    previous: set[int] = set()
    for limit in (1, 5, 20, 99):
        rows = take(keys, strata, limit, "x")
        assert rows == sorted(rows) and len(rows) == limit
        assert previous <= set(rows)
        previous = set(rows)


def test_strata_get_equal_shares():
    strata = ["a"] * 80 + ["b"] * 15 + ["c"] * 5
    rows = take(list(range(100)), strata, 9)
    assert [sum(strata[r] == s for r in rows) for s in "abc"] == [3, 3, 3]


def test_an_exhausted_stratum_leaves_its_share_to_the_others():
    strata = ["a"] * 8 + ["b"] * 2
    rows = take(list(range(10)), strata, 8)
    assert [sum(strata[r] == s for r in rows) for s in "ab"] == [6, 2]


def test_the_slice_is_fixed():
    # written down once: a change here changes what `--limit` means in published results
    fixed = [3, 9, 12, 16, 17]
    assert take(list(range(20)), [0] * 20, 5, "pope") == fixed
    assert take(list(range(20)), [0] * 20, 5, "gqa") != fixed


def test_no_limit_takes_everything():
    assert take([1, 1, 2], [0, 0, 0], None) == [0, 1, 2]
    assert take([1, 1, 2], [0, 0, 0], 3) == [0, 1, 2]


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        take([1, 2], [0], 1)


def test_every_part_is_in_the_smallest_slice_and_slices_stay_nested():
    strata = [i % 3 for i in range(60)]
    parts = [(s, i % 10 == 0) for i, s in enumerate(strata)]
    small, large = (set(take(list(range(60)), strata, n, "pope", parts)) for n in (2, 20))
    assert {parts[i] for i in small} == set(parts) and small <= large
    assert take(list(range(60)), strata, 40, "pope", parts) == take(list(range(60)), strata, 40, "pope")
