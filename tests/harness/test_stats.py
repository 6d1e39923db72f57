"""The cluster bootstrap against closed forms."""

import numpy as np

from harness.tasks.bootstrap import Units, interval, resampled_sums


def mean(sums):
    return sums[:, 0] / sums[:, 1]


def test_gather_sums_documents_of_a_cluster():
    units = Units.gather(["a", "b", "a"], np.array([[1.0, 1], [0, 1], [1, 1]]), ["x", "y", "x"])
    assert units.keys == ("a", "b") and units.strata == ("x", "y")
    assert units.counts.tolist() == [[2, 2], [0, 1]]


def test_interval_of_a_proportion_is_the_normal_one():
    values = np.array([1.0] * 300 + [0.0] * 100)
    units = Units.gather(range(400), np.stack([values, np.ones(400)], 1))
    low, high = interval(units, mean, resamples=4000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert abs(low - (0.75 - half)) < 0.006 and abs(high - (0.75 + half)) < 0.006


def test_clusters_widen_the_interval():
    values = np.repeat([1.0, 0.0], 50)
    counts = np.stack([values, np.ones(100)], 1)
    alone = interval(Units.gather(range(100), counts), mean)
    grouped = interval(
        Units.gather([i // 10 for i in range(100)], counts), mean
    )  # ten equal answers per image
    assert grouped[1] - grouped[0] > 2.5 * (alone[1] - alone[0])


def test_strata_keep_their_sizes():
    units = Units.gather(range(30), np.eye(2)[[0] * 10 + [1] * 20], ["a"] * 10 + ["b"] * 20)
    sums = resampled_sums(units, 50, seed=1)
    assert (sums == [10, 20]).all()


def test_same_seed_same_resamples():
    units = Units.gather(range(30), np.random.default_rng(0).random((30, 3)))
    assert (resampled_sums(units, 20, 3) == resampled_sums(units, 20, 3)).all()
    assert (resampled_sums(units, 20, 3) != resampled_sums(units, 20, 4)).any()
