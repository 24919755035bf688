import numpy as np
import pytest
import torch
from scipy import stats
from test_training import corpus, new_model

from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.records import collect_records
from cratelab.interpret.scores import (
    NEEDS,
    Scores,
    correlation,
    crop,
    needs,
    rank_correlation,
    score,
    split,
    within_token_correlation,
)
from cratelab.reading import NO_TOKEN


def excerpts(k=3, w=8, neurons=(2, 5), seed=0) -> Excerpts:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(19, (*neurons, k, w), generator=draw, dtype=torch.int32)
    activations = torch.rand(*neurons, k, w, generator=draw)
    starts = torch.arange(k).expand(*neurons, k) * 50
    return Excerpts(tokens, activations, starts, torch.full((*neurons, k), w // 2))


def test_correlations_are_scipys_over_the_present_places():
    draw = np.random.default_rng(0)
    a, s = draw.normal(size=(2, 20, 37))
    s += a
    s[:, ::3] = s[:, :1]  # ties
    present = draw.random((20, 37)) < 0.8
    arrays = torch.as_tensor(a), torch.as_tensor(s), torch.as_tensor(present)
    for ours, theirs in (correlation, stats.pearsonr), (rank_correlation, stats.spearmanr):
        expected = [theirs(x[here], y[here])[0] for x, y, here in zip(a, s, present, strict=True)]
        np.testing.assert_allclose(ours(*arrays), expected, atol=1e-12)


def test_within_tokens_is_what_a_regression_on_the_token_leaves():
    """Partial correlation given a dummy variable for each token, by least squares."""
    draw = np.random.default_rng(0)
    tokens, present = draw.integers(7, size=(5, 60)), draw.random((5, 60)) < 0.9
    a, s = draw.normal(size=(2, 5, 60))
    a += 3 * tokens
    s += 0.5 * a
    found = within_token_correlation(*map(torch.as_tensor, (a, s, present, tokens)))
    for i, here in enumerate(present):
        dummies = np.eye(7)[tokens[i, here]]
        left = [y[i, here] - dummies @ np.linalg.lstsq(dummies, y[i, here])[0] for y in (a, s)]
        assert float(found[i]) == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)
    table = torch.as_tensor(draw.normal(size=7)[tokens])  # says the same of every occurrence
    assert within_token_correlation(*map(torch.as_tensor, (a, table, present, tokens))).isnan().all()
    assert within_token_correlation(*map(torch.as_tensor, (table, s, present, tokens))).isnan().all()


def test_a_constant_neuron_or_simulation_has_no_score_and_the_reason_is_kept():
    validation = excerpts()
    validation.activations[0, 1] = 0
    simulated = excerpts(seed=1).activations
    simulated[1, 2] = 0.7
    found = score(simulated, validation)
    assert found.correlation.isnan().nonzero().tolist() == [[0, 1], [1, 2]]
    assert found.dead.nonzero().tolist() == [[0, 1]] and found.constant.nonzero().tolist() == [[1, 2]]
    assert found.by_layer()[0] == pytest.approx(100 * float(found.correlation[0].nansum()) / 5)
    assert found.by_layer(undefined_as_zero=False)[0] == pytest.approx(100 * float(found.correlation[0].nansum()) / 4)


def test_a_score_concatenates_first_and_correlates_once():
    validation, simulated = excerpts(), excerpts(seed=1).activations
    validation.tokens[0, 0, 1, 5:] = NO_TOKEN
    found = score(simulated, validation)
    here = (validation.tokens[0, 0] != NO_TOKEN).flatten()
    pair = validation.activations[0, 0].flatten()[here], simulated[0, 0].flatten()[here]
    assert float(found.correlation[0, 0]) == pytest.approx(stats.pearsonr(*pair)[0])
    assert float(found.rank_correlation[0, 0]) == pytest.approx(stats.spearmanr(*pair)[0])


def test_cropping_keeps_the_token_and_its_neighbours():
    held = excerpts()
    held.offsets[0, 0, 0] = 0
    cropped = crop(held, 3)
    assert (cropped.tokens[1, 1, 1] != NO_TOKEN).nonzero().flatten().tolist() == [3, 4, 5]
    assert (cropped.tokens[0, 0, 0] != NO_TOKEN).nonzero().flatten().tolist() == [0, 1]
    assert cropped.activations[1, 1, 1, 3:6].equal(held.activations[1, 1, 1, 3:6])
    assert (cropped.activations[cropped.tokens == NO_TOKEN] == 0).all()


@pytest.fixture(scope="module")
def records():
    torch.manual_seed(0)
    text = corpus(n=20_000, n_documents=1500)
    return {
        name: collect_records(new_model(), text, **NEEDS[name] | {"window": min(NEEDS[name]["window"], 8)}, batch=100)
        for name in NEEDS
    }


def test_protocols_take_the_stated_excerpts(records, monkeypatch):
    monkeypatch.setitem(NEEDS, "random-only", NEEDS["random-only"] | {"window": 8})
    monkeypatch.setitem(NEEDS, "top-and-random", NEEDS["top-and-random"] | {"window": 8})
    held = records["top-and-random"]
    explain, validate = split(held, "top-and-random", as_published=True)
    assert explain.starts.equal(held.top.starts[:, :, [0, 2, 4, 6, 8]])
    assert validate.starts.equal(torch.cat([held.random.starts[:, :, :5], held.top.starts[:, :, [1, 3, 5, 7, 9]]], 2))
    assert split(held, "random-only")[1].starts.equal(held.random.starts[:, :, :5])
    explain, validate = split(records["anthropic"], "anthropic")
    assert explain.starts.shape[2] == 42 and validate.starts.shape[2] == 47
    with pytest.raises(ValueError, match="anthropic needs records with n_top=25 or more; these have 10"):
        split(held, "anthropic")
    with pytest.raises(ValueError, match="no protocol 'gpt-4'"):
        split(held, "gpt-4")


def test_strictly_no_place_explains_and_validates(records, monkeypatch):
    monkeypatch.setitem(NEEDS, "top-and-random", NEEDS["top-and-random"] | {"window": 8})
    for name in "top-and-random", "anthropic":
        explain, validate = split(records[name], name)

        def places(held, neuron):
            return {
                int(start) + i
                for start, tokens in zip(held.starts[0, neuron], held.tokens[0, neuron], strict=True)
                for i, token in enumerate(tokens.tolist())
                if token != NO_TOKEN
            }

        for neuron in range(0, 64, 7):
            assert not places(explain, neuron) & places(validate, neuron)
            assert places(explain, neuron)


def test_intervals_hold_equally_many_positive_activations(records):
    held = records["anthropic"]
    explain, _ = split(held, "anthropic")
    strength = explain.activations.gather(3, explain.offsets[..., None])[..., 0][:, :, 15:37]
    sample = held.active.activations.gather(3, held.active.offsets[..., None])[..., 0]
    full = (held.active.starts >= 0).all(2)
    assert full.any()
    for layer, neuron in full.nonzero().tolist():
        bounds = sample[layer, neuron].reshape(11, 20)
        for part in range(11):
            for value in strength[layer, neuron, [part, part + 11]]:
                assert bounds[part].min() <= value <= bounds[part].max()


def all_scores(correlation) -> Scores:
    correlation = torch.tensor(correlation, dtype=torch.float64)
    return Scores(
        correlation, correlation, correlation, correlation.isnan(), correlation.isnan() & False, correlation * 0 + 1
    )


def test_a_layer_without_any_score_counts_as_zero_or_not_at_all(recwarn):
    held = all_scores([[0.5, torch.nan], [torch.nan, torch.nan]])
    assert held.by_layer().tolist() == [25, 0]
    assert held.by_layer(False)[0] == 50 and held.by_layer(False)[1].isnan() and not recwarn.list


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: needs("best"), "no protocol 'best'"),
        (lambda: score(torch.zeros(2, 5, 3, 7), excerpts()), r"of one shape; got \(2, 5, 3, 7\) and \(2, 5, 3, 8\)"),
    ],
)
def test_wrong_arguments_of_scores_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
