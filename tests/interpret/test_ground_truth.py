import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.naive_bayes import MultinomialNB
from test_records import activations_of, random_text
from test_training import new_model

import cratelab as cl
from cratelab.corpora import tinyworld
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts, tinyworld_concepts, uses_within_domains
from cratelab.interpret.ground_truth import match_concepts, sense_controls, separate_senses


@pytest.fixture
def setting():
    model = new_model(cl.Gpt2, n_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.blocks[0].mlp_in.weight[3] = 0  # a dead neuron
    text = random_text(700, 50)
    truth = torch.rand(700, 9) < torch.linspace(0.05, 0.5, 9)
    truth[:, 0] = torch.from_numpy(text[:].astype(np.int64)) == 4
    return model, text, Concepts([f"c{i}" for i in range(9)], truth)


def odd_documents(text):
    """Which tokens are in documents 1, 3, 5, …; by a loop."""
    odd = np.zeros(len(text), bool)
    for index in range(1, text.n_documents, 2):
        start, stop = text.document_span(index)
        odd[start:stop] = True
    return odd


def test_the_concept_is_chosen_on_even_documents_and_judged_on_odd_ones_as_sklearn_would(setting):
    model, text, concepts = setting
    odd, truth = odd_documents(text), concepts.truth.numpy()
    least = int(truth[odd].sum(0)[4])  # some are rarer
    candidates = [c for c in range(9) if min(truth[half, c].sum() for half in (odd, ~odd)) >= least]
    assert 0 < len(candidates) < 9
    found = match_concepts(model, text, concepts, batch=7, least=least)
    activations = activations_of(model, text)[0].clamp(min=0).numpy()
    for layer, neuron in (0, 0), (0, 5), (1, 60):
        a = activations[layer, :, neuron]
        thresholds = a[~odd].max() * np.arange(10) / 10
        table = np.array([[f1_score(truth[~odd, c], a[~odd] > t) for c in candidates] for t in thresholds])
        at, best = np.unravel_index(table.argmax(), table.shape)
        best = candidates[best]
        assert int(found.best[layer, neuron]) == best
        f1 = f1_score(truth[odd, best], a[odd] > thresholds[at])
        assert float(found.f1[layer, neuron]) == pytest.approx(f1, abs=1e-5)
        purity, base_rate = a[odd & truth[:, best]].sum() / a[odd].sum(), truth[odd, best].mean()
        assert float(found.purity[layer, neuron]) == pytest.approx(purity, abs=1e-4)
        assert float(found.base_rate[layer, neuron]) == pytest.approx(base_rate, abs=1e-6)
        assert float(found.log_lift[layer, neuron]) == pytest.approx(np.log(purity / base_rate), abs=1e-3)
    assert (found.f1[0, 3], found.best[0, 3], found.n_concepts[0, 3]) == (0, -1, 0)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_the_number_of_concepts_is_that_of_a_greedy_cover(setting, most):
    model, text, concepts = setting
    found = match_concepts(model, text, concepts, coverage=0.7, max_concepts=most, least=1)
    activations = activations_of(model, text)[0].clamp(min=0).double().numpy()
    truth, odd = concepts.truth.numpy(), odd_documents(text)
    for layer, neuron in (0, 0), (0, 9), (1, 2), (1, 33):
        rest, count = activations[layer, :, neuron].copy(), 0
        total = rest[odd].sum()
        while rest[odd].sum() > 0.3 * total and count < most:
            rest[truth[:, (truth * rest[:, None])[~odd].sum(0).argmax()]] = 0
            count += 1
        assert int(found.n_concepts[layer, neuron]) == count + (rest[odd].sum() > 0.3 * total)


def test_noise_lies_on_its_concept_as_often_as_chance_would_have_it():
    """The choice among a hundred concepts no longer flatters: log(purity / base rate) is 0 on average, F1 is lower."""
    text = random_text(4000, 200)
    draw = np.random.default_rng(1)
    truth = torch.from_numpy(draw.random((4000, 100)) < 0.02)
    noise = torch.from_numpy(draw.random((4000, 64)) * (draw.random((4000, 64)) < 0.02)).float()
    model = Detector([lambda t, i=i: noise[t, i] for i in range(64)], 4000)
    places = TokenizedCorpus.from_arrays(
        np.arange(4000), np.repeat(np.arange(200), [len(text.document(i)) for i in range(200)]), ["a"] * 200, 4000
    )
    found = match_concepts(model, places, Concepts([str(i) for i in range(100)], truth))
    assert abs(float((found.purity / found.base_rate).mean()) - 1) < 0.25
    assert float(found.f1.mean()) < 0.04


class Detector(torch.nn.Module):
    """Stands for a model: one layer whose neurons are given functions of the tokens."""

    def __init__(self, functions, v=50):
        super().__init__()
        self.functions = functions
        self.config = cl.CrateConfig(n_layers=1, n_heads=1, width=4, vocab_size=v, context=40)
        self.token_embedding = torch.nn.Embedding(1, 1)
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].neurons = torch.nn.Identity()

    def forward(self, tokens):
        return self.blocks[0].neurons(torch.stack([f(tokens).float() for f in self.functions], -1))


def test_a_planted_detector_is_perfect_and_a_mixture_is_not():
    text = random_text(2000, 120)
    tokens = torch.from_numpy(text[:].astype(np.int64))
    concepts = Concepts(["four", "five", "even"], torch.stack([tokens == 4, tokens == 5, tokens % 2 == 0], 1))
    model = Detector([lambda t: t == 4, lambda t: (t == 4) | (t == 5), lambda t: torch.ones_like(t)])
    found = match_concepts(model, text, concepts)
    assert found.f1[0, 0] == found.purity[0, 0] == 1 and found.best[0, 0] == 0
    assert found.n_concepts[0].tolist()[:2] == [1, 2]
    assert 0.6 < float(found.f1[0, 1]) < 0.72 and 0.4 < float(found.purity[0, 1]) < 0.6
    assert float(found.purity[0, 2]) == pytest.approx(float(found.base_rate[0, 2]))


def test_senses_told_apart_by_the_token_before():
    """The word is 7; its sense is decided by the token before, which one neuron looks at with some noise."""
    draw = np.random.default_rng(0)
    stream = draw.integers(20, size=4000)
    stream[1::2] = np.where(draw.random(2000) < 0.3, 7, stream[1::2])
    before = np.roll(stream, 1)
    word = stream == 7
    word[0] = False
    concepts = Concepts(
        ["sense:seven/low", "sense:seven/high", "class:noun"],
        torch.from_numpy(np.stack([word & (before < 10), word & (before >= 10), word], 1)),
    )
    corpus = TokenizedCorpus.from_arrays(stream, np.arange(4000) // 40, ["a"] * 100, 50)

    def earlier(tokens):
        return torch.cat([tokens[:, :1], tokens[:, :-1]], 1)

    model = Detector([lambda t: t % 3, lambda t: (earlier(t) - 10).clamp(min=0) * (t == 7), lambda t: t])
    area, layer, neuron = separate_senses(model, corpus, concepts)["seven"]
    assert (layer, neuron) == (0, 1)
    inside = word & (np.arange(4000) % 40 > 0)
    expected = roc_auc_score(before[inside] >= 10, np.maximum(before[inside] - 10, 0))
    assert area == pytest.approx(expected, abs=0.05) and area > 0.9
    blind = Detector([lambda t: t % 3, lambda t: t])  # the word's own token: one tie
    assert separate_senses(blind, corpus, concepts)["seven"][0] == 0.5


def test_what_tells_senses_apart_without_a_network_is_the_domain_and_a_bag_as_sklearn_would():
    world = tinyworld.generate(60_000, seed=3, context=128)
    text, n = world.corpus(), len(world.tokens)
    odd = world.document % 2 == 1
    start = np.searchsorted(world.document, world.document)
    for concepts, by_domain in (tinyworld_concepts(world), 1.0), (uses_within_domains(world), 0.5):
        found = sense_controls(text, concepts, n_before=40)
        bag = np.zeros((n, text.n_vocab))
        marked = [name.startswith("sense:") for name in concepts.names]
        for place in np.flatnonzero(concepts.truth[:, marked].any(1)):
            np.add.at(bag[place], world.tokens[max(start[place], place - 40) : place], 1)
        assert len(found) > 5
        assert all(area == by_domain for word, (area, _) in found.items() if word not in ("bank", "bat"))
        for word, (_, area) in found.items():
            first, second = (
                concepts.truth[:, i].numpy()
                for i, name in enumerate(concepts.names)
                if name.startswith(f"sense:{word}/")
            )
            learn, judge = ((first ^ second) & half for half in (~odd, odd))
            odds = MultinomialNB().fit(bag[learn], first[learn]).predict_log_proba(bag[judge]) @ [-1, 1]
            assert area == pytest.approx(roc_auc_score(first[judge], odds), abs=2e-3)


def test_words_are_chosen_and_judged_on_different_documents():
    """A neuron that knows the sense in even documents only is chosen, and found wanting."""
    stream = np.arange(2000) % 20
    document, odd = np.arange(2000) // 20, (np.arange(2000) // 20) % 2 == 1
    high = np.random.default_rng(0).random(2000) < 0.5
    word = stream == 7
    concepts = Concepts(["sense:w/a", "sense:w/b"], torch.from_numpy(np.stack([word & high, word & ~high], 1)))
    places = TokenizedCorpus.from_arrays(np.arange(2000), document, ["a"] * 100, 2000)
    known = torch.from_numpy(high & ~odd).float()
    area, layer, neuron = separate_senses(Detector([lambda t: known[t]], 2000), places, concepts)["w"]
    assert (area, layer, neuron) == (0.5, 0, 0)


def one_document(text):
    return TokenizedCorpus.from_arrays(text[:], np.zeros(len(text), np.int64), ["a"], text.n_vocab)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model, text, held: match_concepts(model, text, Concepts(held.names, held.truth[:99])),
            "are of 99 tokens",
        ),
        (lambda model, text, held: separate_senses(model, text, Concepts([], held.truth[:99])), "are of 99 tokens"),
        (lambda model, text, held: match_concepts(model, text, Concepts([], held.truth[:, :0])), "none of 0 concepts"),
        (lambda model, text, held: match_concepts(model, text, held, least=500), "none of 9 concepts occurs 500 times"),
        (lambda model, text, held: match_concepts(model, text, held, least=0), "least of at least 1"),
        (lambda model, text, held: match_concepts(model, one_document(text), held), "more documents"),
        (lambda model, text, held: match_concepts(model, text, held, coverage=float("nan")), "coverage from 0 to 1"),
        (
            lambda model, text, held: match_concepts(model, text, held, max_concepts=10**9),
            "max_concepts from 0 to 1000",
        ),
        (lambda model, text, held: match_concepts(model, text, held, max_concepts=-1), "max_concepts from 0 to 1000"),
        (
            lambda model, text, held: match_concepts(model, text, held, batch=0),
            "batch must be at least 1",
        ),
        (lambda model, text, held: sense_controls(text, Concepts([], held.truth[:99])), "are of 99 tokens"),
        (lambda model, text, held: sense_controls(text, held, 0), "n_before must be at least 1"),
        (lambda model, text, held: separate_senses(model, text, held, batch=-1), "(batch|window) must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(setting, call, message):
    with pytest.raises(ValueError, match=message):
        call(*setting)


def test_a_corpus_with_tokens_above_its_own_vocabulary_is_named(setting):
    model, text, concepts = setting
    tokens = text[:].copy()
    tokens[17] = 40
    lengths = [len(text.document(i)) for i in range(text.n_documents)]
    wrong = TokenizedCorpus([tokens], [np.stack([lengths, np.zeros_like(lengths)], 1)], [["a"]], 19)
    with pytest.raises(ValueError, match="the corpus holds token 40, the model knows 19"):
        match_concepts(model, wrong, concepts)
