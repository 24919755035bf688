import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from test_records import activations_of, random_text
from test_training import new_model

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.ground_truth import match_concepts, separate_senses


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


def test_best_concept_f1_and_purity_are_sklearns(setting):
    model, text, concepts = setting
    found = match_concepts(model, text, concepts, batch=7)
    activations = activations_of(model, text)[0].clamp(min=0).numpy()
    truth = concepts.truth.numpy()
    for layer, neuron in (0, 0), (0, 5), (1, 60):
        a = activations[layer, :, neuron]
        table = np.array([[f1_score(truth[:, c], a > a.max() * t / 10) for c in range(9)] for t in range(10)])
        best = int(found.best[layer, neuron])
        assert float(found.f1[layer, neuron]) == pytest.approx(table.max(), abs=1e-5)
        assert table[:, best].max() == pytest.approx(table.max(), abs=1e-5)
        assert float(found.purity[layer, neuron]) == pytest.approx(a[truth[:, best]].sum() / a.sum(), abs=1e-4)
        assert float(found.base_rate[layer, neuron]) == pytest.approx(truth[:, best].mean(), abs=1e-6)
    assert (found.f1[0, 3], found.best[0, 3], found.n_concepts[0, 3]) == (0, -1, 0)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_the_number_of_concepts_is_that_of_a_greedy_cover(setting, most):
    model, text, concepts = setting
    found = match_concepts(model, text, concepts, coverage=0.7, max_concepts=most)
    activations = activations_of(model, text)[0].clamp(min=0).double().numpy()
    truth = concepts.truth.numpy()
    for layer, neuron in (0, 0), (0, 9), (1, 2), (1, 33):
        rest, total, count = activations[layer, :, neuron].copy(), activations[layer, :, neuron].sum(), 0
        while rest.sum() > 0.3 * total and count < most:
            rest[truth[:, (truth * rest[:, None]).sum(0).argmax()]] = 0
            count += 1
        assert int(found.n_concepts[layer, neuron]) == count + (rest.sum() > 0.3 * total)


class Detector(torch.nn.Module):
    """Stands for a model: one layer whose neurons are given functions of the tokens."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.config = cl.CrateConfig(n_layers=1, n_heads=1, width=4, vocab_size=50, context=40)
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model, text, held: match_concepts(model, text, Concepts(held.names, held.truth[:99])),
            "are of 99 tokens",
        ),
        (lambda model, text, held: separate_senses(model, text, Concepts([], held.truth[:99])), "are of 99 tokens"),
        (lambda model, text, held: match_concepts(model, text, Concepts([], held.truth[:, :0])), "needs a concept"),
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
