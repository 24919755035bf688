import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from test_training import corpus, new_model, recipe, weights

from cratelab.interpret.evaluation import collect_for_protocols, evaluate, untrained
from cratelab.interpret.explainers import SuffixExplainer, TokenExplainer
from cratelab.interpret.reading import NO_TOKEN
from cratelab.interpret.scores import split
from cratelab.training import train


@pytest.fixture(scope="module")
def trained():
    model = new_model(context=128, width=16)
    train(model, corpus(n=4000), corpus(n=600, seed=1), recipe(steps=60, batch=8))
    return model


@pytest.fixture(scope="module")
def evaluations(trained):
    held = collect_for_protocols(trained, corpus(n=6000, n_documents=60, seed=1))
    return held, evaluate(held, {"token": TokenExplainer(), "suffix": SuffixExplainer()})


def test_every_protocol_meets_every_explainer(evaluations):
    _, found = evaluations
    assert [(each.protocol, each.explainer) for each in found] == [
        (protocol, name) for protocol in ("top-and-random", "random-only", "anthropic") for name in ("token", "suffix")
    ]


def test_a_neurons_score_is_that_of_its_own_lists(evaluations):
    """One neuron followed by hand through explanation, simulation and score."""
    held, found = evaluations
    explain, validate = split(held["top-and-random"], "top-and-random")
    for neuron in range(0, 64, 9):
        a, tokens = explain.activations[0, neuron].double().numpy(), explain.tokens[0, neuron].numpy()
        tenths = np.floor(10 * a.clip(0) / max(a.max(), 1e-30))
        known = {token: tenths[tokens == token].mean() for token in set(tokens.flatten()) - {NO_TOKEN}}
        pairs = [
            (float(value), known.get(int(token), 0.0))
            for token, value in zip(
                validate.tokens[0, neuron].flatten(), validate.activations[0, neuron].flatten(), strict=True
            )
            if token != NO_TOKEN
        ]
        actual, simulated = np.array(pairs).T
        ours = float(found[0].scores.correlation[0, neuron])
        if actual.std() and simulated.std():
            assert ours == pytest.approx(pearsonr(actual, simulated)[0], abs=1e-9)
        else:
            assert np.isnan(ours)


def test_explanations_beat_their_controls(evaluations):
    for each in evaluations[1]:
        row = each.row()
        assert row["mean"] > row["control"] + 5 and 0 <= row["undefined"] <= 1
        assert row["interval"][0] < row["mean"] < row["interval"][1]
        assert row["mean_defined"] >= row["mean"] and row["dead"] <= row["undefined"]


def test_officially_too(trained):
    held = collect_for_protocols(trained, corpus(n=6000, seed=1), strict=False)
    found = evaluate(held, {"token": TokenExplainer()}, strict=False)
    assert len(found) == 3 and all(np.isfinite(each.row()["mean"]) for each in found)


def test_the_untrained_model_is_fresh_and_repeatable(trained):
    one, two = untrained(trained), untrained(trained)
    assert one.config == trained.config and not one.training
    assert all(tensor.equal(weights(two)[name]) for name, tensor in weights(one).items())
    assert not one.token_embedding.weight.equal(trained.token_embedding.weight)
    assert not torch.equal(untrained(trained, seed=1).token_embedding.weight, one.token_embedding.weight)
