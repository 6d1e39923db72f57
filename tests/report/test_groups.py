"""Which methods a leaderboard calls apart."""

import numpy as np
import pytest

from harness.report import tables
from harness.tasks.bootstrap import Units, groups, holm, stream, sums_of_many


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_scores_share_a_letter_exactly_if_they_cannot_be_told_apart():
    noise = np.random.default_rng(0).normal(size=(4, 4000))
    points = np.array([90.0, 89.0, 70.0, 87.0])
    assert groups(points, points[:, None] + noise) == ["a", "a", "b", "a"]
    assert groups(points, points[:, None] + 0.8 * noise) == ["a", "ab", "c", "b"]


def test_luck_that_two_methods_share_does_not_hide_their_difference():
    """A difference of 1 beside noise of 5 that is the same for both."""
    luck = np.random.default_rng(0).normal(scale=5, size=4000)
    points = np.array([80.0, 81.0])
    own = np.random.default_rng(1).normal(scale=0.1, size=(2, 4000))
    assert groups(points, points[:, None] + luck + own) == ["b", "a"]


def test_unrelated_tasks_do_not_share_their_resamples():
    counts = np.random.default_rng(0).random((40, 1))
    one, two = (Units(tuple(f"{t}{i}" for i in range(40)), counts, (0,) * 40) for t in "ab")
    first, second = (sums_of_many([u], 2000, stream(u, 0))[0][:, 0] for u in (one, two))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert (sums_of_many([one], 2000, stream(one, 0))[0][:, 0] == first).all()


@pytest.mark.parametrize(
    "spec, label",
    [
        ("stepprune:checkpoint=/home/somebody/run 1/k64.safetensors", "stepprune:checkpoint=k64.safetensors"),
        ("fastv:k=3,schedule=average", "fastv:k=3,schedule=average"),
        ("a:file=~/x/y.pt,k=2", "a:file=y.pt,k=2"),
    ],
)
def test_a_method_is_called_by_the_names_of_its_files(spec, label):
    assert tables.labels([spec]) == {spec: label}


def test_files_of_one_name_are_told_apart():
    found = tables.labels(["m:f=/a/one/k.pt", "m:f=/a/two/k.pt"])
    assert list(found.values()) == ["m:f=one/k.pt", "m:f=two/k.pt"]


def test_nothing_in_a_table_is_markup():
    text = tables.markdown([{"Method": "a|b <b>x</b> /home/me/secret/file.txt", "n": "1"}])
    assert "a\\|b &lt;b&gt;x&lt;/b&gt; file.txt" in text and "secret" not in text
    assert tables.unescaped(tables.escaped("a|b <c> & d")) == "a|b <c> & d"
