from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering import a_sae, shaken, some_tokens, steered
from test_training import VOCAB, corpus

import cratelab as cl
from cratelab.corpora.tokenizers import WordEncoding
from cratelab.interpret.concepts import Concepts, concept_tokens
from cratelab.interpret.explainers import TokenExplainer
from cratelab.interpret.records import collect_records
from cratelab.sae import splice
from cratelab.steering import (
    Frontier,
    control_tokens,
    direct_effect,
    draw_live,
    frontier,
    generate_when_set,
    most_raised,
    neuron_maxima,
    repetition,
    steer,
    token_counts,
)


@pytest.fixture(params=[cl.Crate, cl.Gpt2])
def model(request):
    return shaken(request.param)


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def by_loop(clean, steered, target, control):
    """Lift, control lift and off-target divergence of logits (b, n, v): one position after another."""
    rows = []
    for x, y in zip(clean.reshape(-1, VOCAB), steered.reshape(-1, VOCAB), strict=True):
        p, q = softmax(x), softmax(y)
        rest = [v for v in range(VOCAB) if not target[v]]
        p_rest, q_rest = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        rows.append(
            [
                np.log(q[target].sum()) - np.log(p[target].sum()),
                np.log(q[control].sum()) - np.log(p[control].sum()),
                sum(a * np.log(a / b) for a, b in zip(p_rest, q_rest, strict=True)),
            ]
        )
    return np.mean(rows, 0)


def token_sets(m):
    targets, controls = torch.zeros(2, m, VOCAB, dtype=torch.bool)
    for i in range(m):
        targets[i, torch.randperm(VOCAB)[: 1 + i % 4]] = True
        controls[i, torch.randperm(VOCAB)[: 2 + i % 3]] = True
    return targets, controls


@pytest.mark.parametrize("arm", ["own", "spliced", "error term"])
@pytest.mark.parametrize("layer", [0, 1])
def test_lift_and_divergence_are_those_of_a_loop_over_positions(model, arm, layer):
    model, sae, contexts = model.double(), a_sae(model).double(), some_tokens(3, 5)
    neurons, maxima, strengths = torch.tensor([4, 33, 60]), torch.tensor([1.0, 2.0, 0.5]).double(), (0.5, 4.0)
    targets, controls = token_sets(3)

    def within():
        return splice(model, {layer: sae} if arm != "own" else {}, arm == "error term")

    found = frontier(model, contexts, layer, neurons, maxima, targets, controls, strengths, within, batch=2)
    with torch.no_grad():
        clean = model(contexts).cpu().numpy()
    for j in range(3):
        for row, strength in enumerate((None, *strengths)):
            edits = {} if strength is None else dict(layer=layer, neuron=neurons[j], value=strength * maxima[j])
            with within():
                changed = steered(model, contexts, **edits).cpu().numpy()
            expected = by_loop(clean, changed, targets[j].cpu().numpy(), controls[j].cpu().numpy())
            measured = [found.lift[row, j], found.control_lift[row, j], found.off_target[row, j]]
            np.testing.assert_allclose(measured, expected, atol=1e-9)


def test_what_leaves_the_model_as_it_is_costs_nothing_and_a_reconstruction_costs_its_own(model):
    contexts, sae, (targets, controls) = some_tokens(4, 6), a_sae(model), token_sets(2)
    given = contexts, 1, torch.tensor([1, 2]), torch.ones(2), targets, controls, (1.0,)
    own = frontier(model, *given)
    assert own.loss_penalty == own.kl_penalty == 0
    for measured in own.lift, own.control_lift, own.off_target:
        assert measured[0].abs().max() < 1e-6
    with_error = frontier(model, *given, lambda: splice(model, {1: sae}, error_term=True))
    assert abs(with_error.loss_penalty) < 1e-5 and abs(with_error.kl_penalty) < 1e-5
    spliced = frontier(model, *given, lambda: splice(model, {1: sae}))
    with torch.no_grad():
        clean = model(contexts).double().cpu().numpy()
        with splice(model, {1: sae}):
            changed = model(contexts).double().cpu().numpy()
    losses, divergences = [], []
    for b in range(4):
        for n in range(6):
            p, q = softmax(clean[b, n]), softmax(changed[b, n])
            divergences.append((p * np.log(p / q)).sum())
            if n < 5:
                losses.append(np.log(p[contexts[b, n + 1]] / q[contexts[b, n + 1]]))
    assert spliced.kl_penalty == pytest.approx(np.mean(divergences), rel=1e-4) and spliced.kl_penalty > 0.01
    assert spliced.loss_penalty == pytest.approx(np.mean(losses), abs=1e-5)


def test_extremes_stay_finite():
    model, (targets, controls) = shaken(cl.Gpt2), token_sets(4)
    with torch.no_grad():
        model.token_embedding.weight *= 100
        found = frontier(
            model, some_tokens(2, 4), 1, torch.arange(4), torch.full((4,), 1e4), targets, controls, (1.0, 8.0)
        )
    assert found.lift.abs().max() > 100 and all(t.isfinite().all() for t in (found.lift, found.off_target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets=torch.zeros(2, VOCAB, dtype=torch.bool)), r"targets must name some .* leave out rows \[0, 1\]"),
        (dict(targets=torch.ones(2, VOCAB, dtype=torch.bool)), "targets must name some and not all"),
        (dict(controls=torch.ones(2, VOCAB)), rf"controls must be \(2, {VOCAB}\) bool; got .*float32"),
        (dict(targets=torch.ones(3, VOCAB, dtype=torch.bool)), r"targets must be \(2"),
    ],
)
def test_sets_of_tokens_that_measure_nothing_are_refused(change, message):
    targets, controls = token_sets(2)
    with pytest.raises(ValueError, match=message):
        arguments = dict(targets=targets, controls=controls) | change
        frontier(shaken(cl.Crate), some_tokens(), 0, torch.arange(2), torch.ones(2), **arguments)


def a_frontier(lift, off_target):
    lift, off_target = torch.tensor(lift).double(), torch.tensor(off_target).double()
    return Frontier(lift, lift, off_target, 0.0, 0.0)


def test_the_cost_at_a_lift_is_read_where_it_is_first_reached():
    found = a_frontier(
        [[0.0, 0.0, 0.0, 1.5], [1.0, -1.0, 0.2, 2.0], [3.0, 2.0, 0.9, 3.0]],
        [[0.0, 0.0, 0.0, 0.7], [0.1, 0.4, 0.1, 0.8], [0.5, 1.0, 9.0, 1.0]],
    )
    assert found.cost_at(1.0).tolist() == pytest.approx([0.1, 0.4 + 2 / 3 * 0.6, np.inf, 0.7])
    falls_again = a_frontier([[0.0], [2.0], [0.5], [3.0]], [[0.0], [1.0], [5.0], [6.0]])
    assert falls_again.cost_at(1.0).item() == 0.5


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=6), st.data())
def test_a_frontier_that_rises_is_read_as_numpy_interpolates(steps, data):
    lift = np.cumsum([0.0, *steps])
    costs = np.array(data.draw(st.lists(st.floats(0, 5), min_size=len(lift), max_size=len(lift))))
    found, level = a_frontier(lift[:, None], costs[:, None]), data.draw(st.floats(0, float(lift[-1])))
    assert found.cost_at(level).item() == pytest.approx(np.interp(level, lift, costs), abs=1e-6)


def test_the_mean_cost_is_the_area_under_the_frontier():
    found = a_frontier(
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, 3.0, 1.9]], [[0.0, 0.4, 0], [2.0, 0.4, 0], [2.0, 0.4, 0]]
    )
    assert found.mean_cost(2.0).tolist() == pytest.approx([(1 + 2) / 2, 0.4, np.inf], rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(8, 60), st.integers(1, 6), st.integers(0, 3))
def test_controls_are_as_many_as_frequent_and_no_targets(m, v, n_bins, seed):
    targets, counts = torch.rand(m, v) < 0.2, torch.randint(1000, (v,))
    controls = control_tokens(targets, counts, n_bins, seed)
    assert not (controls & targets).any()
    for tokens in np.array_split(np.argsort(counts.cpu().numpy(), kind="stable"), n_bins):
        for row, control in zip(targets[:, tokens], controls[:, tokens], strict=True):
            assert int(control.sum()) == min(int(row.sum()), int((~row).sum()))


def test_controls_are_drawn_at_random_and_repeatably():
    targets, counts = torch.zeros(400, 40, dtype=torch.bool), torch.arange(40)
    targets[:, 3] = True
    controls = control_tokens(targets, counts, n_bins=4, seed=1)
    assert controls.equal(control_tokens(targets, counts, n_bins=4, seed=1))
    assert not controls.equal(control_tokens(targets, counts, n_bins=4, seed=2))
    share = controls.double().mean(0)
    assert (
        share[3] == 0
        and not share[10:].any()
        and share[:10][share[:10] > 0].tolist() == pytest.approx([1 / 9] * 9, abs=0.06)
    )


def test_targets_by_effect_leave_out_what_fills_up_the_vocabulary():
    effects = torch.tensor([[0.0, 3.0, 1.0, 2.0, 9.0], [5.0, 1.0, 2.0, 3.0, 9.0]])
    assert most_raised(effects, 2, n_vocab=4).tolist() == [
        [False, True, False, True, False],
        [True, False, False, True, False],
    ]


def test_targets_by_explanation_are_those_it_names():
    model, text = shaken(cl.Gpt2), corpus()
    explanations = TokenExplainer().explain(collect_records(model, text, window=6, n_top=4, n_random=3).top)
    neurons, tokenizer = torch.tensor([40, 2, 17]), WordEncoding([f"w{i}" for i in range(VOCAB)])
    for layer in 0, 1:
        found = explanations.named_tokens(layer, neurons, 5, VOCAB)
        for row, neuron in zip(found, neurons.tolist(), strict=True):
            said = explanations.describe(layer, neuron, tokenizer, n=5)
            assert {f"'w{i}'" for i in row.nonzero()[:, 0].tolist()} == {word for word in said.split() if "w" in word}
            assert row.any()


def test_targets_by_concept_have_it_more_often_than_not():
    text = corpus()
    tokens = text[:].astype(int)
    truth = torch.rand(len(tokens), 6) < torch.linspace(0.2, 0.7, 6)
    found = concept_tokens(Concepts([f"c{i}" for i in range(6)], truth), text, torch.tensor([5, 0, 3, 3]), VOCAB + 2)
    for row, concept in zip(found.tolist(), (5, 0, 3, 3), strict=True):
        for token in range(VOCAB + 2):
            there = [bool(truth[i, concept]) for i in range(len(tokens)) if tokens[i] == token]
            assert row[token] == (sum(there) > len(there) / 2)
    assert found.any() and token_counts(text, VOCAB + 2).tolist() == [Counter(tokens)[v] for v in range(VOCAB + 2)]


def test_live_neurons_are_drawn_by_the_seed():
    maxima = torch.where(torch.arange(200) % 2 == 0, 1.0, 0.0)
    drawn = draw_live(maxima, 60, seed=3)
    assert len(drawn) == 60 == len(set(drawn.tolist())) and all(i % 2 == 0 for i in drawn.tolist())
    assert drawn.equal(draw_live(maxima, 60, seed=3)) and not drawn.equal(draw_live(maxima, 60, seed=4))
    assert draw_live(maxima, 500).tolist() == list(range(0, 200, 2))


def test_every_neuron_writes_its_own_text(model):
    prompts, neurons, values = some_tokens(2, 3), torch.tensor([7, 20, 41]), torch.tensor([9.0, 6.0, 12.0])
    for arm in {}, {0: a_sae(model)}:
        with splice(model, arm):
            found = generate_when_set(model, prompts, 0, neurons, values, 5, temperature=0)
            for row, neuron, value in zip(found, neurons, values, strict=True):
                with steer(model, layer=0, neuron=neuron, value=value):
                    assert row.equal(model.generate(prompts, 5, temperature=0)[:, 3:])
    assert not any(module._forward_hooks for module in model.modules())


@given(st.integers(1, 4), st.integers(3, 20), st.integers(1, 3), st.integers(1, 3))
def test_repetition_counts_runs_seen_before(m, n, length, vocab):
    tokens = torch.randint(vocab, (m, 2, n))
    for texts, shares in zip(tokens.tolist(), repetition(tokens, length).tolist(), strict=True):
        for text, share in zip(texts, shares, strict=True):
            runs = [tuple(text[i : i + length]) for i in range(n - length + 1)]
            seen, repeated = set(), 0
            for run in runs:
                repeated += run in seen
                seen.add(run)
            assert share == pytest.approx(repeated / len(runs))


def test_repetition_of_texts_that_are_too_short_is_refused():
    with pytest.raises(ValueError, match="runs of 3 tokens need texts as long; got 2"):
        repetition(torch.zeros(1, 2, dtype=torch.long))


def test_neurons_lift_what_their_atoms_raise_more_than_controls(model):
    """All the pieces together, on a model's own last layer."""
    text = corpus()
    maxima = neuron_maxima(model, text)[1]
    neurons = draw_live(maxima, 20)
    targets = most_raised(direct_effect(model, 1, neurons), 3, VOCAB)
    controls = control_tokens(targets, token_counts(text, VOCAB), n_bins=3)
    contexts = torch.as_tensor(text.validation_windows(8, 6))
    found = frontier(model, contexts, 1, neurons, maxima[neurons], targets, controls)
    assert (found.lift[-1] > found.control_lift[-1]).double().mean() > 0.9 and found.lift[-1].mean() > 0.5


@pytest.mark.parametrize("arm", ["own", "spliced"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.04)])
def test_frontiers_of_models_of_every_precision_agree(model, dtype, tolerance, arm):
    contexts, sae, (targets, controls) = some_tokens(4, 6), a_sae(model), token_sets(3)
    exact, rounded = shaken(type(model)), model.to(dtype)
    found, expected = (
        frontier(
            each, contexts, 1, torch.tensor([4, 33, 60]), torch.tensor([1.0, 2.0, 0.5]).to(dtype), targets, controls,
            (0.5, 2.0), lambda each=each: splice(each, {1: sae} if arm == "spliced" else {}),
        )
        for each in (rounded, exact)
    )  # fmt: skip
    for name in "lift", "control_lift", "off_target", "loss_penalty", "kl_penalty":
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=tolerance, rel=tolerance)
    texts = generate_when_set(rounded, contexts, 0, torch.tensor([4, 33]), torch.tensor([1.0, 2.0]), 3, temperature=0)
    assert texts.shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(strengths=[]), "strengths must be positive numbers that rise"),
        (dict(strengths=[1.0, float("nan")]), "strengths must be positive numbers that rise"),
        (dict(strengths=[-1.0, 1.0]), "strengths must be positive"),
        (dict(strengths=[0.0, 1.0]), "strengths must be positive"),
        (dict(strengths=[2.0, 1.0]), "numbers that rise"),
        (dict(strengths=[1.0, 1.0]), "numbers that rise"),
        (dict(strengths=[1.0, float("inf")]), "numbers that rise"),
        (dict(strengths=[1e30]), r"at most 1e\+15"),
        (dict(maxima=torch.tensor([1.0, torch.nan])), "finite and at least 0"),
        (dict(maxima=torch.tensor([1.0, -1.0])), "finite and at least 0"),
        (dict(maxima=torch.ones(3)), "and their maxima"),
        (dict(neurons=torch.tensor([0, 64])), "has neurons 0 to 63"),
        (dict(layer=2), "layers 0 to 1"),
        (dict(contexts=torch.full((2, 3), VOCAB)), f"integers from 0 to {VOCAB - 1}"),
        (dict(contexts=torch.zeros(3, 1, dtype=torch.long)), "n at least 2"),
        (dict(contexts=torch.zeros(0, 3, dtype=torch.long)), "c at least 1"),
    ],
)
def test_frontiers_that_mean_nothing_are_refused_before_anything_runs(change, message):
    targets, controls = token_sets(2)
    model, runs = shaken(cl.Gpt2), []
    model.register_forward_hook(lambda *_: runs.append(1))
    usual = dict(contexts=some_tokens(), layer=0, neurons=torch.arange(2), maxima=torch.ones(2))
    with pytest.raises(ValueError, match=message):
        frontier(model, **usual | dict(targets=targets, controls=controls) | change)
    assert not runs


def test_without_neurons_there_is_no_frontier():
    none, no_set = torch.zeros(0, dtype=torch.long), torch.zeros(0, VOCAB, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs one neuron or more"):
        frontier(shaken(cl.Gpt2), some_tokens(), 0, none, torch.zeros(0), no_set, no_set)
    with pytest.raises(ValueError, match="m at least 1"):
        generate_when_set(shaken(cl.Gpt2), some_tokens(), 0, none, torch.zeros(0), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: a_frontier([[0.0]], [[0.0]]).cost_at(float("nan")), "lift must be a number"),
        (lambda: a_frontier([[0.0]], [[0.0]]).mean_cost(0.0), "positive finite lift"),
        (lambda: a_frontier([[0.0]], [[0.0]]).mean_cost(float("nan")), "positive finite lift"),
        (lambda: a_frontier([[0.0]], [[0.0]]).mean_cost(1.0, n=0), "n must be at least 1"),
        (lambda: draw_live(torch.ones(4), 0), "n must be at least 1"),
        (lambda: draw_live(torch.ones(4), float("nan")), "n must be at least 1"),
        (lambda: draw_live(torch.tensor([1.0, torch.nan]), 1), "finite maxima"),
        (lambda: draw_live(torch.ones(4), 2, seed=-1), "seed must be from 0 to"),
        (lambda: draw_live(torch.ones(4), 2, seed=1.5), "seed must be from 0 to"),
        (lambda: most_raised(torch.ones(2, 5), 6, 5), "1 <= n <= n_vocab <= 5"),
        (lambda: most_raised(torch.ones(2, 5), 2, 6), "1 <= n <= n_vocab <= 5"),
        (lambda: most_raised(torch.ones(2, 5), 0, 5), "n must be at least 1"),
        (lambda: most_raised(torch.full((2, 5), torch.nan), 1, 5), "effects that are numbers"),
        (lambda: token_counts(corpus(), VOCAB - 1), f"the corpus has {VOCAB} tokens, more than v={VOCAB - 1}"),
        (lambda: control_tokens(torch.zeros(2, 5), torch.ones(5)), "targets .* of bool"),
        (lambda: control_tokens(torch.zeros(2, 5, dtype=torch.bool), torch.ones(4)), r"counts \(v,\)"),
        (lambda: control_tokens(torch.zeros(2, 5, dtype=torch.bool), torch.ones(5), 0), "n_bins must be at least 1"),
        (lambda: control_tokens(torch.zeros(2, 5, dtype=torch.bool), torch.ones(5), seed=2**32), "seed must be"),
        (lambda: repetition(torch.zeros(1, 5, dtype=torch.long), 0), "length must be at least 1"),
    ],
)
def test_requests_without_an_answer_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_explanations_of_what_is_not_there_are_refused():
    explanations = TokenExplainer().explain(collect_records(shaken(cl.Gpt2), corpus(), 6, n_top=4, n_random=3).top)
    for layer, neuron, n in ((2, 0, 3), (-1, 0, 3), (0, 64, 3), (0, 0, VOCAB + 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="named_tokens needs a layer from 0 to 1, neurons from 0 to 63"):
            explanations.named_tokens(layer, torch.tensor([neuron]), n, VOCAB)
