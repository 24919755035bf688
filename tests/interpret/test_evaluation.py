from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from test_training import VOCAB, corpus, new_model, recipe

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import WordEncoding
from cratelab.interpret.concepts import text_concepts
from cratelab.interpret.evaluation import Evaluation, collect_for_protocols, evaluate
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.ground_truth import match_concepts, separate_senses
from cratelab.interpret.openai_records import read_neuron_record, write_neuron_record
from cratelab.interpret.records import Records, collect_records
from cratelab.interpret.scores import Scores, split
from cratelab.models import untrained
from cratelab.reading import NO_TOKEN
from cratelab.storage import read_json, write_json
from cratelab.training import train
from cratelab.viewers.neurons import viewer


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


def test_the_same_excerpts_are_explained_once_and_others_anew(evaluations, monkeypatch):
    held, found = evaluations
    explained, explain = [], TokenExplainer.explain
    monkeypatch.setattr(
        TokenExplainer, "explain", lambda self, excerpts: explained.append(1) or explain(self, excerpts)
    )
    for alone in ({protocol: records} for protocol, records in held.items()):
        (each,) = evaluate(alone, {"token": TokenExplainer()})
        (theirs,) = (one for one in found if (one.protocol, one.explainer) == (each.protocol, "token"))
        torch.testing.assert_close(each.scores.correlation, theirs.scores.correlation, equal_nan=True)
    assert len(explained) == 3
    evaluate(held, {"token": TokenExplainer()})
    assert len(explained) == 3 + 2, "random-only explains from the excerpts of top-and-random"
    other = held["top-and-random"].top.activations.clone()
    changed = replace(held["random-only"], top=replace(held["random-only"].top, activations=2 * other))
    evaluate(held | {"random-only": changed}, {"token": TokenExplainer()})
    assert len(explained) == 3 + 2 + 3, "the same places with other activations"


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


def test_a_row_is_of_the_layers_asked_for():
    values = torch.tensor([[0.2, 0.4], [0.8, torch.nan]]).double()
    scores = Scores(values, values, values, values.isnan(), values.isnan() & False, values * 0 + 1)
    found = Evaluation("random-only", "token", scores, scores, explanations=None)
    row = found.row()
    assert row["layers"] == pytest.approx([30, 40]) and row["mean"] == row["control"] == pytest.approx(35)
    assert row["variance"] == pytest.approx(25) and row["mean_defined"] == pytest.approx(55)
    assert found.row([-1])["mean"] == pytest.approx(40) and found.row([-1])["undefined"] == 0.5
    for layers in [2], [-3], []:
        with pytest.raises(ValueError, match="row needs layers below 2, at least one; got"):
            found.row(layers)


def test_officially_too(trained):
    held = collect_for_protocols(trained, corpus(n=6000, seed=1), as_published=True)
    found = evaluate(held, {"token": TokenExplainer()}, as_published=True)
    assert len(found) == 3 and all(np.isfinite(each.row()["mean"]) for each in found)


def with_dead_layer(model_class=cl.Crate, dtype=torch.float32, **sizes):
    model = new_model(model_class, n_layers=2, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        silenced = model.blocks[1].ista_norm if model_class is cl.Crate else model.blocks[1].mlp_in
        for parameter in silenced.parameters():
            parameter.zero_()
    return model.to(dtype).eval()


def all_explainers(text):
    concepts = text_concepts(text, WordEncoding([f"w{i}" for i in range(18)]))
    return {"token": TokenExplainer(), "suffix": SuffixExplainer(), "concept": ConceptExplainer(concepts)}


@pytest.mark.parametrize(("n_tokens", "as_published"), [(1, False), (20, False), (20, True), (2000, False)])
def test_a_dead_layer_and_short_texts_give_rows_that_can_be_written(n_tokens, as_published, tmp_path):
    text = corpus(n=3000, n_documents=60)
    held = collect_for_protocols(with_dead_layer(), text, as_published=as_published, n_tokens=n_tokens)
    rows = [each.row() for each in evaluate(held, all_explainers(text), as_published=as_published)]
    assert len(rows) == 9
    for row in rows:
        assert row["dead"] >= 0.5 and row["mean_defined"] != row["mean_defined"]  # NaN: a layer has no score at all
        assert np.isfinite([row["mean"], *row["interval"], row["control"], row["rank_mean"], row["coverage"]]).all()
        assert len(row["layers"]) == 2 and row["layers"][1] == 0
    write_json(tmp_path / "interpret.json", {"rows": rows})
    assert all(row["mean_defined"] is None for row in read_json(tmp_path / "interpret.json")["rows"])
    held["top-and-random"].save(tmp_path)
    back = Records.load(tmp_path)
    neurons = [(layer, neuron) for layer in (0, 1) for neuron in (0, 5)]
    explained = {"token": TokenExplainer().explain(back.top)}
    words = WordEncoding([f"w{i}" for i in range(18)])
    viewer(back, words, neurons, explained).save(tmp_path / "page.html")
    write_neuron_record(back, 1, 0, words, tmp_path / "0.json")
    top, _ = read_neuron_record(tmp_path / "0.json", words)
    assert not len(top.starts[0, 0])


@pytest.mark.parametrize("model_class", [cl.Crate, cl.Gpt2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions_go_all_the_way(model_class, dtype):
    """In float64 the scores are those of float32, but for equal activations; in half precision they are near."""
    text = corpus(n=1500, n_documents=30)
    concepts = text_concepts(text, WordEncoding([f"w{i}" for i in range(18)]))
    means = {}
    for each in torch.float32, dtype:
        model = with_dead_layer(model_class, each)
        held = collect_for_protocols(model, text, ("top-and-random",))["top-and-random"]
        assert held.top.activations.dtype == held.random.activations.dtype == torch.float32
        assert held.mean.dtype == held.maximum.dtype == torch.float64
        found = evaluate({"top-and-random": held}, all_explainers(text))
        means[each] = [each.row()["mean"] for each in found]
        known = match_concepts(model, text, concepts, max_concepts=1)
        assert known.f1.dtype == torch.float32 and known.f1.isfinite().all() and known.f1.max() > 0.1
        assert separate_senses(model, text, concepts) == {}
        fresh = untrained(model)
        assert fresh.token_embedding.weight.dtype == each
        collect_records(fresh, text, 8)
    assert np.isfinite(means[dtype]).all()
    assert means[dtype] == pytest.approx(means[torch.float32], abs=3 if dtype == torch.float64 else 15)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_are_not_finite_are_named_with_their_layer(layer, value):
    text = corpus(n=300)
    model, concepts = with_dead_layer(), text_concepts(text, WordEncoding([f"w{i}" for i in range(18)]))

    def spoil(module, inputs, output):
        output = output.clone()
        output[0, 1, 3] = value
        return output

    model.blocks[layer].neurons.register_forward_hook(spoil)
    for read in (
        lambda: collect_records(model, text, 8),
        lambda: match_concepts(model, text, concepts),
        lambda: separate_senses(model, text, concepts),
        lambda: collect_for_protocols(model, text),
    ):
        with pytest.raises(ValueError, match=f"layer {layer} of the model has activations that are NaN or infinite"):
            read()


def test_activations_whose_squares_are_not_finite_are_named():
    model = new_model()
    model.blocks[0].neurons.register_forward_hook(lambda module, inputs, output: output * 1e30)
    with pytest.raises(ValueError, match="too large for single precision"):
        collect_records(model, corpus(n=300), 8)


def test_what_is_read_past_is_not_looked_at():
    """Padding behind the end of a document may be anything."""
    model, text = with_dead_layer(), corpus(n=300)

    def spoil(module, inputs, output):
        return output.masked_fill((model.read == 0)[..., None], torch.nan)

    def note(module, inputs):
        model.read = inputs[0].clone()

    model.register_forward_pre_hook(note)
    model.blocks[1].neurons.register_forward_hook(spoil)
    tokens = 1 + text[:] % (VOCAB - 1)  # token 0 pads, and is nowhere in the text
    document = np.repeat(np.arange(text.n_documents), [len(text.document(i)) for i in range(text.n_documents)])
    without = TokenizedCorpus.from_arrays(tokens, document, ["a"] * text.n_documents, VOCAB)
    assert collect_records(model, without, 8).top.activations.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, text: collect_for_protocols(model, text, ()), "no protocol is given"),
        (lambda model, text: collect_for_protocols(model, text, ["best"]), "no protocol 'best'"),
        (lambda model, text: collect_for_protocols(model, text, n_tokens=0), "n_tokens must be at least 1"),
        (lambda model, text: collect_for_protocols(model, text, n_tokens=-5), "n_tokens must be at least 1"),
        (lambda model, text: collect_for_protocols(model, text, seed=-1), "seed must be from 0 to"),
        (lambda model, text: collect_for_protocols(model, text, seed=2**32), "seed must be from 0 to"),
        (lambda model, text: collect_records(model, text, batch=0), "batch of at least 1"),
        (lambda model, text: collect_records(model, text, window=10**11), "a window is at most 4096 tokens"),
        (lambda model, text: collect_records(model, text, n_top=10**9), "excerpts of a neuron at most 1000"),
        (lambda model, text: evaluate({}, {"token": TokenExplainer()}), "evaluate needs records and explainers"),
        (lambda model, text: evaluate({"anthropic": None}, {}), "evaluate needs records and explainers"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(call, message, monkeypatch):
    model = with_dead_layer()
    monkeypatch.setattr(model, "forward", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message):
        call(model, corpus())
