from collections import defaultdict

import numpy as np
import pytest
import torch
from test_scores import excerpts

from cratelab.corpora.tokenizers import WordEncoding
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer, discretise, shuffle
from cratelab.interpret.scores import score
from cratelab.reading import NO_TOKEN

WORDS = WordEncoding([f"w{i}" for i in range(19)])


def tenths(activations) -> np.ndarray:
    largest = max(0.0, float(activations.max()))
    return np.array(
        [[min(10, int(10 * max(0, a) / largest)) if largest else 0 for a in row] for row in activations.tolist()]
    )


def test_discretised_activations_are_tenths_rounded_down():
    held = excerpts().activations
    held[0, 0] -= 2  # never positive
    for layer, neuron in (0, 0), (1, 3):
        assert discretise(held)[layer, neuron].numpy() == pytest.approx(tenths(held[layer, neuron]))


def test_token_explanations_are_means_by_token():
    explain, validate = excerpts(k=6), excerpts(k=4, seed=1)
    explain.tokens[1, 2, 3, 4:] = NO_TOKEN
    simulated, coverage = TokenExplainer().explain(explain).simulate(validate)
    for layer, neuron in (0, 0), (1, 2), (1, 4):
        n, tokens = tenths(explain.activations[layer, neuron]), explain.tokens[layer, neuron].numpy()
        for place, token in np.ndenumerate(validate.tokens[layer, neuron].numpy()):
            expected = n[tokens == token].mean() if (tokens == token).any() else 0
            assert float(simulated[layer, neuron][place]) == pytest.approx(expected)
        seen = np.isin(validate.tokens[layer, neuron].numpy(), tokens).mean()
        assert float(coverage[layer, neuron]) == pytest.approx(seen)


def brute_force_suffixes(tokens, n, order, kappa):
    """Dictionaries from suffix to p, one suffix length after another."""
    p = [{(): 0.0}]
    for length in range(1, order + 1):
        sums, counts = defaultdict(float), defaultdict(int)
        for row, values in zip(tokens, n, strict=True):
            padded = ["start"] * order + row
            for i, value in enumerate(values):
                suffix = tuple(padded[i + order - length + 1 : i + order + 1])
                sums[suffix] += value
                counts[suffix] += 1
        p.append({s: (sums[s] + kappa * p[-1][s[1:]]) / (counts[s] + kappa) for s in sums})
    return p


@pytest.mark.parametrize(("order", "kappa"), [(1, 0.5), (2, 1.0), (3, 1.0)])
def test_suffix_explanations_are_those_of_dictionaries(order, kappa):
    explain, validate = excerpts(k=8), excerpts(k=5, seed=1)
    explain.tokens %= 3
    validate.tokens %= 4  # one token that was never seen
    simulated, _ = SuffixExplainer(order, kappa).explain(explain).simulate(validate)
    for layer, neuron in (0, 1), (1, 4):
        tables = brute_force_suffixes(
            explain.tokens[layer, neuron].tolist(), tenths(explain.activations[layer, neuron]), order, kappa
        )
        for i, row in enumerate(validate.tokens[layer, neuron].tolist()):
            padded = ["start"] * order + row
            for j in range(len(row)):
                suffixes = (tuple(padded[j + order - length + 1 : j + order + 1]) for length in range(order, -1, -1))
                known = next((len(s), s) for s in suffixes if s in tables[len(s)])
                assert float(simulated[layer, neuron, i, j]) == pytest.approx(tables[known[0]][known[1]])


def planted(kind: str) -> tuple[Excerpts, Excerpts]:
    """Two neurons whose activation is decided by a token, or by a token and the one before it."""
    halves = []
    for seed in range(2):
        held = excerpts(k=40, w=16, neurons=(1, 2), seed=seed)
        held.tokens %= 4
        before = torch.cat([torch.full_like(held.tokens[..., :1], 9), held.tokens[..., :-1]], -1)
        fires = held.tokens == 2 if kind == "token" else (held.tokens == 2) & (before == 1)
        held.activations = fires.float() * (3 + held.activations)
        halves.append(held)
    return halves[0], halves[1]


def test_a_neuron_of_one_token_is_explained_and_its_name_said():
    explain, validate = planted("token")
    explained = TokenExplainer().explain(explain)
    assert (score(explained.simulate(validate)[0], validate).correlation > 0.95).all()
    assert explained.describe(0, 0, WORDS).startswith("active on 'w2' (")


def test_a_neuron_of_two_tokens_needs_suffixes():
    explain, validate = planted("pair")
    by_token = score(TokenExplainer().explain(explain).simulate(validate)[0], validate).correlation
    by_suffix = score(SuffixExplainer().explain(explain).simulate(validate)[0], validate).correlation
    assert (by_token < 0.7).all() and (by_suffix > 0.95).all()


def test_a_silent_neuron_is_said_to_be_silent():
    explain, validate = planted("token")
    explain.activations.zero_()
    explained = TokenExplainer().explain(explain)
    assert explained.describe(0, 0, WORDS) == "never active in the excerpts"
    assert score(explained.simulate(validate)[0], validate).constant.all()


def test_another_neurons_explanation_says_nothing():
    draw = torch.Generator().manual_seed(0)
    halves = []
    meaning = torch.randint(19, (1, 60, 1, 1), generator=draw)
    for seed in range(2):
        held = excerpts(k=30, w=16, neurons=(1, 60), seed=seed)
        held.activations = (held.tokens == meaning).float()
        halves.append(held)
    explained = TokenExplainer().explain(halves[0])
    own = score(explained.simulate(halves[1])[0], halves[1]).correlation
    control = score(shuffle(explained, halves[1])[0], halves[1]).correlation
    assert (own > 0.99).all()
    same_meaning = (meaning.flatten() == meaning.flatten()[:, None]).double().mean()
    assert abs(float(control.nanmean()) - float(same_meaning)) < 0.15


def test_each_control_is_simulated_by_exactly_one_other_neuron():
    """Neuron j is active on token j, and all neurons read the same text: the control of j names another token."""
    held = excerpts(k=12, w=16, neurons=(1, 19))
    held.tokens = held.tokens[:, :1].expand(1, 19, 12, 16).clone()
    held.activations = (held.tokens == torch.arange(19)[:, None, None]).float()
    simulated, _ = shuffle(TokenExplainer().explain(held), held)
    named = [held.tokens[0, j][simulated[0, j] > 0].unique().tolist() for j in range(19)]
    assert all(len(tokens) == 1 and tokens != [j] for j, tokens in enumerate(named))
    assert sorted(named) == [[j] for j in range(19)]


def concepts(n=4000, c=12, seed=0) -> Concepts:
    draw = torch.Generator().manual_seed(seed)
    return Concepts([f"c{i}" for i in range(c)], torch.rand(n, c, generator=draw) < 0.3)


def planted_concepts(rule) -> tuple[Excerpts, Excerpts, Concepts]:
    known, halves = concepts(), []
    for seed in range(2):
        held = excerpts(k=30, w=16, neurons=(2, 3), seed=seed)
        held.starts = torch.randint(3900, held.starts.shape, generator=torch.Generator().manual_seed(seed))
        truth = known.of(held)
        held.activations = rule(truth).float() * (1 + held.activations)
        halves.append(held)
    return halves[0], halves[1], known


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (lambda truth: truth[..., 4], "active where c4"),
        (lambda truth: truth[..., 4] & truth[..., 7], "active where c4 and c7"),
        (lambda truth: truth[..., 2] & ~truth[..., 9], "active where c2 and not c9"),
    ],
)
def test_planted_concepts_are_found_and_simulated(rule, sentence):
    explain, validate, known = planted_concepts(rule)
    explained = ConceptExplainer(known).explain(explain)
    said = {explained.describe(layer, neuron) for layer in range(2) for neuron in range(3)}
    assert said <= {sentence, "active where c7 and c4"}
    simulated, coverage = explained.simulate(validate)
    assert (score(simulated, validate).correlation > 0.85).all() and (coverage == 1).all()
    assert float(simulated.max()) == pytest.approx(1.5, abs=0.2)


def test_the_concept_is_the_one_of_highest_correlation():
    explain, _, known = planted_concepts(lambda truth: truth[..., 4])
    explain.activations = torch.rand(explain.activations.shape)
    explain.tokens[0, 0, 0, 3:] = NO_TOKEN
    explained = ConceptExplainer(known, gain=2.0).explain(explain)  # no conjunction gains so much
    for layer, neuron in (0, 0), (1, 1):
        here = (explain.tokens[layer, neuron] != NO_TOKEN).flatten()
        a = explain.activations[layer, neuron].flatten()[here].numpy()
        truth = known.of(explain)[layer, neuron].reshape(-1, 12)[here].numpy()
        correlations = [np.corrcoef(a, truth[:, c])[0, 1] for c in range(12)]
        assert int(explained.first[layer, neuron]) == int(np.argmax(correlations))
        assert int(explained.second[layer, neuron]) == -1


def test_no_concept_is_forced_on_a_silent_neuron():
    explain, validate, known = planted_concepts(lambda truth: truth[..., 4] & False)
    explained = ConceptExplainer(known).explain(explain)
    assert explained.describe(0, 0) == "active where no concept says"
    simulated, coverage = explained.simulate(validate)
    assert (simulated == 0).all() and (coverage == 0).all()


def test_a_model_whose_neurons_are_all_silent_is_explained_as_silent():
    silent = excerpts()
    silent = silent.without(torch.ones_like(silent.tokens, dtype=torch.bool))
    for explainer in (
        TokenExplainer(),
        SuffixExplainer(),
        ConceptExplainer(Concepts(["a"], torch.zeros(2000, 1).bool())),
    ):
        simulated, coverage = explainer.explain(silent).simulate(excerpts(seed=1))
        assert not simulated.any() and not coverage[coverage < 1].any()


def test_no_excerpt_explains_nothing():
    none = excerpts()[[]]
    for explainer in TokenExplainer(), SuffixExplainer(), ConceptExplainer(Concepts(["a"], torch.ones(2000, 1).bool())):
        explained = explainer.explain(none)
        simulated, coverage = explained.simulate(excerpts(seed=1))
        assert not simulated.any() and not coverage.any()
        assert explained.describe(0, 0, WORDS) in ("never active in the excerpts", "active where no concept says")
        assert explainer.explain(excerpts()).simulate(none)[0].shape == none.tokens.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_activations_of_any_precision_are_explained(dtype):
    explain, validate = excerpts(), excerpts(seed=1)
    explain.activations, validate.activations = explain.activations.to(dtype), validate.activations.to(dtype)
    known = Concepts(["even", "odd"], torch.arange(4000).reshape(2000, 2) % 3 == 0)
    for explainer in TokenExplainer(), SuffixExplainer(), ConceptExplainer(known):
        simulated, coverage = explainer.explain(explain).simulate(validate)
        found = score(simulated, validate, coverage)
        assert simulated.isfinite().all() and found.correlation.dtype == torch.float64


ONE = Concepts(["a"], torch.zeros(2000, 1).bool())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SuffixExplainer(0), "order >= 1"),
        (lambda: SuffixExplainer(2.5), "whole order >= 1"),
        (lambda: SuffixExplainer(shrinkage=float("nan")), "shrinkage >= 0"),
        (lambda: SuffixExplainer(shrinkage=float("inf")), "shrinkage >= 0"),
        (lambda: SuffixExplainer(20).explain(excerpts()), "too many suffixes of 20"),
        (lambda: SuffixExplainer(10**9).explain(excerpts()), "too many suffixes"),
        (lambda: ConceptExplainer(Concepts([], torch.zeros(2000, 0).bool())), "needs a concept"),
        (lambda: ConceptExplainer(ONE, n_first=0), "n_first >= 1"),
        (lambda: ConceptExplainer(ONE, gain=float("nan")), "gain >= 0"),
        (lambda: ConceptExplainer(Concepts(["a"], ONE.truth[:90])).explain(excerpts()), "from beyond them"),
        (lambda: shuffle(TokenExplainer().explain(excerpts()), excerpts(), seed=-1), "seed must be from 0 to"),
        (lambda: TokenExplainer().explain(excerpts()).describe(0, 0, WordEncoding(["w"])), "there is no token"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
