import math

import numpy as np
import pytest
import torch
from scipy import stats

from cratelab.intervals import equivalence, holm, interval, interval_over_neurons


def test_half_widths_are_students():
    values = torch.randn(5).double()
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert interval(values.tolist()) == pytest.approx((high - low) / 2)
    assert interval([1.0]) is None and np.isnan(interval([1.0, np.inf]))


def test_the_interval_over_neurons_is_that_of_scipy():
    scores = torch.rand(3, 40).double()
    theirs = stats.bootstrap(
        100 * scores.numpy(),
        lambda *layers, axis: np.mean([layer.mean(axis) for layer in layers], 0),
        n_resamples=500,
        method="percentile",
        random_state=np.random.default_rng(7),
    )
    assert interval_over_neurons(scores, 500, seed=7) == pytest.approx(theirs.confidence_interval)
    assert interval_over_neurons(torch.tensor([[0.25], [0.75]]).double()) == (50, 50)


def test_the_interval_over_neurons_covers():
    """Of many samples whose true mean is 30, the 95 % interval holds it in nearly 95 %."""
    draw = np.random.default_rng(0)
    samples = torch.as_tensor(draw.normal([[0.2], [0.4]], 0.3, (200, 2, 80)))
    found = [interval_over_neurons(scores, 300, seed) for seed, scores in enumerate(samples)]
    assert 180 <= sum(low < 30 < high for low, high in found) <= 199


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval_over_neurons(torch.ones(1, 2), n_resamples=0), "n_resamples must be at least 1"),
        (lambda: interval_over_neurons(torch.ones(1, 2), seed=-1), "seed must be from 0 to"),
        (lambda: interval_over_neurons(torch.ones(0, 2)), r"at least one neuron; got scores of shape \(0, 2\)"),
    ],
)
def test_intervals_of_nothing_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holm_rejects_what_its_step_down_rule_rejects():
    draw = np.random.default_rng(0)
    for size in (1, 2, 5, 9):
        p = draw.uniform(size=size) ** 3
        p[-1] = p[0]
        adjusted = np.array(holm(p.tolist()))
        for level in (0.01, 0.05, 0.2, 0.6):
            rejected = np.zeros(size, bool)
            for rank, i in enumerate(np.argsort(p, kind="stable")):
                if p[i] > level / (size - rank):
                    break
                rejected[i] = True
            assert ((adjusted <= level) == rejected).all()
        assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert holm([]) == []
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.1, math.nan])


def test_equivalence_is_an_interval_of_ninety_per_cent_inside_the_margin():
    draw = np.random.default_rng(1)
    for n, scale in ((2, 0.1), (5, 1.0), (10, 0.3)):
        values = (0.2 + scale * draw.normal(size=n)).tolist()
        half = stats.t.ppf(0.95, n - 1) * np.std(values, ddof=1) / n**0.5
        edge = abs(np.mean(values)) + half
        assert equivalence(values, 1.01 * edge) < 0.05 < equivalence(values, 0.99 * edge)
    for values, margin in (([1.0], 1.0), ([1.0, 2.0], 0.0), ([1.0, 2.0], math.nan)):
        with pytest.raises(ValueError, match="two values or more and a margin above 0"):
            equivalence(values, margin)


@pytest.mark.filterwarnings("ignore:Precision loss")
@pytest.mark.parametrize("edge", [0.5, -0.5])
def test_values_that_are_all_the_margin_itself_are_no_equivalence(edge):
    """Without any spread t is 0/0 there, on either side of zero."""
    assert math.isnan(equivalence([edge] * 3, 0.5))
