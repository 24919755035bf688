import numpy as np
import pytest
import torch
from test_training import corpus, new_model

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret import running_layer
from cratelab.interpret.excerpts import places_of_neurons
from cratelab.interpret.records import Records, collect_records
from cratelab.reading import NO_TOKEN, watch_neurons


def random_text(n: int, n_documents: int) -> TokenizedCorpus:
    draw = np.random.default_rng(0)
    document = np.unique(np.sort(draw.integers(n_documents, size=n)), return_inverse=True)[1]
    return TokenizedCorpus.from_arrays(draw.integers(19, size=n), document, ["a"] * (document[-1] + 1), 19)


def activations_of(model, text, strict=True):
    """All activations (l, n, h), and the piece (start, stop) that each token is read in, one piece at a time."""
    context, n = model.config.context, len(text)
    spans = [text.document_span(i) for i in range(text.n_documents)] if strict else [(0, n)]
    pieces = [(s, min(s + context, stop)) for start, stop in spans for s in range(start, stop, context)]
    layers = [[] for _ in model.blocks]
    hooks = [
        block.neurons.register_forward_hook(lambda m, a, out, each=each: each.append(out[0].detach().cpu()))
        for block, each in zip(model.blocks, layers, strict=True)
    ]
    for start, stop in pieces:
        model(torch.as_tensor(text[start:stop].astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(each) for each in layers]), pieces


def brute_force_top(activations, pieces, window, k, strict=True):
    """Greedy, one neuron at a time over plain lists: (start, stop, offset) of its k strongest windows."""
    candidates = []
    for start, stop in pieces:
        places = sorted(range(start, stop), key=lambda i: -activations[i])
        taken = []
        for c in places:
            if activations[c] <= 0:
                break
            first = max(start, min(c - window // 2, stop - window))
            if strict and any(abs(first - other) < window for other in taken):
                continue
            taken.append(first)
            candidates.append((activations[c], first, min(first + window, stop), c - first))
    return sorted(candidates, reverse=True)[:k]


@pytest.fixture(params=[cl.Crate, cl.Gpt2])
def model(request):
    model = new_model(request.param, n_layers=2, width=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("window", [4, 7, 16])
def test_top_excerpts_are_those_of_brute_force(model, window, strict):
    text = random_text(500, 40)
    found = collect_records(model, text, window, n_top=6, as_published=not strict, batch=5)
    activations, pieces = activations_of(model, text, strict)
    agree = total = 0
    for layer in range(2):
        for neuron in range(0, activations.shape[-1], 3):
            expected = brute_force_top(activations[layer, :, neuron].tolist(), pieces, window, 6, strict)
            values, taken = [value for value, *_ in expected], set()
            starts = found.top.starts[layer, neuron].tolist()
            assert starts[len(expected) :] == [-1] * (6 - len(expected))
            for rank, first in enumerate(starts[: len(expected)]):  # equal texts give ties, so values are compared
                (piece,) = [piece for piece in pieces if piece[0] <= first < piece[1]]
                stop, offset = min(first + window, piece[1]), int(found.top.offsets[layer, neuron, rank])
                excerpt = found.top.activations[layer, neuron, rank]
                torch.testing.assert_close(excerpt[: stop - first], activations[layer, first:stop, neuron])
                assert excerpt[offset] == pytest.approx(values[rank], abs=1e-5)
                tokens = found.top.tokens[layer, neuron, rank].tolist()
                assert tokens == text[first:stop].tolist() + [NO_TOKEN] * (window - (stop - first))
                if strict:
                    assert not set(range(first, stop)) & taken
                taken |= set(range(first, stop))
            agree += starts[: len(expected)] == [first for _, first, _, _ in expected]
            total += 1
    assert agree > 0.6 * total


def test_the_result_does_not_depend_on_the_batch(model):
    text = corpus(n=300)
    one, many = (collect_records(model, text, 6, n_active=9, batch=batch, seed=4) for batch in (1, 50))
    assert one.random.starts.equal(many.random.starts)
    strength = [found.top.activations.gather(3, found.top.offsets[..., None]) for found in (one, many)]
    torch.testing.assert_close(*strength, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.mean, many.mean)


def test_statistics_are_those_of_all_tokens(model):
    text = corpus(n=400)
    found = collect_records(model, text, 8)
    activations = activations_of(model, text)[0].double()
    torch.testing.assert_close(found.mean, activations.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.variance, activations.var(1, correction=0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.maximum, activations.amax(1), atol=1e-6, rtol=1e-5)
    off = (400 * found.density - (activations > 0).sum(1)).abs().round()
    assert found.n_tokens == 400 and off.max() <= 1 and off.sum() <= 2  # an activation may be within rounding of 0


def test_random_excerpts_are_the_same_for_all_neurons_and_hold_their_activations(model):
    text = corpus(n=400)
    found = collect_records(model, text, 6, n_random=20, seed=1)
    activations, pieces = activations_of(model, text)
    starts = found.random.starts
    assert starts.shape == (2, activations.shape[-1], 20) and (starts == starts[0, 0]).all()
    for rank, first in enumerate(starts[0, 0].tolist()):
        (piece,) = [piece for piece in pieces if piece[0] <= first < piece[1]]
        stop = min(first + 6, piece[1])
        excerpt = found.random.activations[:, :, rank, : stop - first]
        torch.testing.assert_close(excerpt, activations[:, first:stop].mT)
        assert found.random.tokens[0, 0, rank, : stop - first].tolist() == text[first:stop].tolist()
    other = collect_records(model, text, 6, n_random=20, seed=2)
    assert not other.random.starts.equal(starts)


def test_random_places_are_uniform_over_tokens():
    """Over many seeds each tenth of the text holds a tenth of the places, within five standard deviations."""
    model, text = new_model(), corpus(n=240, n_documents=1)
    places = []
    for seed in range(40):
        found = collect_records(model, text, 2, n_top=0, n_random=50, seed=seed).random
        places += (found.starts + found.offsets)[0, 0].tolist()
    counts = np.bincount(np.array(places) // 24, minlength=10)
    assert counts.sum() == 2000 and (abs(counts - 200) < 5 * np.sqrt(180)).all()


def test_the_sample_of_active_places_is_uniform_over_them(model):
    """Quantiles of the sample are those of all positive activations, within the sampling error of 200 of them."""
    text = corpus(n=3000, n_documents=150)
    found = collect_records(model, text, 4, n_active=200, seed=3).active
    activations = activations_of(model, text)[0]
    strength = found.activations.gather(3, found.offsets[..., None])[..., 0]
    checked = 0
    for layer in range(2):
        for neuron in range(activations.shape[-1]):
            positive = activations[layer, :, neuron]
            positive = positive[positive > 0]
            sample = strength[layer, neuron][found.starts[layer, neuron] >= 0]
            assert len(sample) == min(200, len(positive)) and (sample > 0).all()
            assert (sample[1:] <= sample[:-1]).all()
            if len(positive) > 400:
                below = float((sample < positive.median()).double().mean())
                assert abs(below - 0.5) < 5 * 0.5 / 200**0.5
                checked += 1
    assert checked > 10


def test_the_sample_of_active_places_is_that_of_the_highest_keys_however_the_text_is_batched(model, monkeypatch):
    text, k = random_text(500, 40), 12
    activations, pieces = activations_of(model, text)
    keys = np.concatenate([np.random.default_rng([7, 1, a]).random(b - a, dtype=np.float32) for a, b in pieces])
    for batch, chunk in (1, 2**20), (50, 2**20), (5, 100):
        monkeypatch.setattr(running_layer, "CHUNK", chunk)
        found = collect_records(model, text, 4, n_active=k, batch=batch, seed=7).active
        agree = 0
        for layer in range(2):
            for neuron in range(activations.shape[-1]):
                positive = (activations[layer, :, neuron] > 0).nonzero()[:, 0].numpy()
                expected = sorted(positive[np.argsort(-keys[positive])][:k].tolist())
                there = found.starts[layer, neuron] >= 0
                places = (found.starts + found.offsets)[layer, neuron][there]
                agree += sorted(places.tolist()) == expected
        assert agree >= 2 * activations.shape[-1] - 1  # an activation may be within rounding of 0


@pytest.mark.parametrize("strict", [True, False])
def test_the_result_does_not_depend_on_how_much_is_searched_at_a_time(model, strict, monkeypatch):
    text = random_text(500, 40)
    whole = collect_records(model, text, 5, as_published=not strict).top
    monkeypatch.setattr(running_layer, "CHUNK", 100)
    parts = collect_records(model, text, 5, as_published=not strict).top
    strength = [found.activations.gather(3, found.offsets[..., None]) for found in (whole, parts)]
    assert strength[0].equal(strength[1])  # equal texts give ties, so not the places


def test_padding_counts_neither_for_the_maximum_nor_for_anything_else(model):
    """Every activation is negative, so a zero from behind a piece's end would be the maximum."""
    for block in model.blocks:
        block.neurons.register_forward_hook(lambda m, a, out: out - 50)
    text = corpus(n=400)
    found = collect_records(model, text, 8)
    activations = activations_of(model, text)[0].double()
    assert (found.maximum < 0).all() and (found.density == 0).all() and (found.top.starts == -1).all()
    torch.testing.assert_close(found.maximum, activations.amax(1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.mean, activations.mean(1), atol=1e-4, rtol=1e-5)


def test_the_model_is_run_no_further_than_its_last_neurons(model):
    after = []
    model.norm.register_forward_hook(lambda *_: after.append(1))
    hooks = [len(block.neurons._forward_hooks) for block in model.blocks]
    collect_records(model, corpus(n=200), 8)
    assert not after and [len(block.neurons._forward_hooks) for block in model.blocks] == hooks
    model(torch.zeros(1, 3, dtype=torch.long))
    assert after


@pytest.mark.parametrize("ahead", [1, 3])
def test_each_token_is_read_once_in_order_or_the_longest_pieces_first(model, ahead):
    text = random_text(500, 40)
    lengths, places = [], []
    for part, layers in watch_neurons(model, text, batch=4, ahead=ahead):
        assert len(layers) == 2 and part.full == bool(part.present.all())
        lengths.append(part.present.sum(1).tolist())
        places += (part.starts[:, None] + torch.arange(part.tokens.shape[1]))[part.present].tolist()
    assert sorted(places) == list(range(500))
    if ahead == 1:
        assert places == sorted(places)
    else:
        for first in range(0, len(lengths), ahead):
            group = np.concatenate(lengths[first : first + ahead])
            assert (group[1:] <= group[:-1]).all()


def test_a_neuron_that_is_never_positive_has_no_top_excerpts():
    model = new_model(cl.Gpt2)
    with torch.no_grad():
        model.blocks[0].mlp_in.weight.zero_()
    found = collect_records(model, corpus(n=200), 8, n_active=5)
    assert (found.top.starts == -1).all() and (found.top.activations == 0).all()
    assert (found.top.tokens == NO_TOKEN).all() and (found.active.starts == -1).all()
    assert (found.density == 0).all()


def test_records_come_back_from_disk_and_damage_is_named(model, tmp_path):
    found = collect_records(model, corpus(n=200), 8, n_active=5)
    found.save(tmp_path)
    again = Records.load(tmp_path)
    for name, tensor in found._tensors().items():
        assert again._tensors()[name].equal(tensor)
    assert again.n_tokens == 200 and again.window == 8
    (tmp_path / "records.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"records.safetensors cannot be read"):
        Records.load(tmp_path)


def test_only_the_first_tokens_are_read_when_so_asked(model):
    found = collect_records(model, corpus(n=400), 8, n_tokens=150)
    assert found.n_tokens == 150 and int(found.top.starts.max()) < 150


def test_memory_of_what_is_kept_does_not_grow_with_the_text(model, monkeypatch):
    sizes = []
    original = running_layer.RunningLayer.update

    def measure(self, *arguments):
        original(self, *arguments)
        sizes.append(sum(tensor.numel() for tensor in self.top.buffers()) + len(self.random))

    monkeypatch.setattr(running_layer.RunningLayer, "update", measure)
    collect_records(model, corpus(n=1500, n_documents=90), 8, n_random=0, batch=4)
    assert len(sizes) > 20 and len(set(sizes)) == 1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="needs window and batch of at least 1"):
        collect_records(new_model(), corpus(), window=0)
    with pytest.raises(ValueError, match="the corpus has 19 tokens, the model knows 7"):
        collect_records(new_model(vocab_size=7), corpus())
    with pytest.raises(ValueError, match="no token"):
        collect_records(new_model(), TokenizedCorpus.from_arrays(np.zeros(0, int), np.zeros(0, int), [], 3))


def test_records_do_not_depend_on_the_default_precision(model):
    text = random_text(400, 4)
    expected = collect_records(model, text, window=8, n_top=3, n_random=4)
    torch.set_default_dtype(torch.float64)
    try:
        found = collect_records(model, text, window=8, n_top=3, n_random=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.top.activations.dtype == found.random.activations.dtype == torch.float32
    torch.testing.assert_close(found.top.activations, expected.top.activations, rtol=0, atol=0)
    torch.testing.assert_close(found.random.activations, expected.random.activations, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "indices", "shape"),
    [(1, [5, 0], (1, 2)), ([1, 0], [5, 0], (1, 2)), ([[1], [0]], [[5, 0, 3]] * 2, (2, 3))],
)
def test_records_of_some_neurons_are_theirs_in_the_order_asked(model, layers, indices, shape):
    every = collect_records(model, corpus(n=300), 8, n_active=3)
    some = every.neurons(layers, indices)
    layers, indices = np.broadcast_arrays(layers, indices)
    assert some.top.starts.shape[:2] == some.mean.shape == shape and some.n_tokens == every.n_tokens
    for kind in "top", "random", "active":
        for name, held in vars(getattr(some, kind)).items():
            pairs = zip(held.flatten(0, 1), layers.flat, indices.flat, strict=True)
            assert all(one.equal(getattr(getattr(every, kind), name)[layer, i]) for one, layer, i in pairs)
    assert some.maximum.flatten().equal(every.maximum[layers.ravel(), indices.ravel()])


@pytest.mark.parametrize(
    ("layers", "indices"), [(0.9, [1]), (0, [1.0]), ([True], [1]), ([0, 1], [0, 1, 2]), ("a", [1])]
)
def test_neurons_are_whole_numbers_that_broadcast(layers, indices):
    with pytest.raises(ValueError, match="layers and indices must be whole numbers that broadcast"):
        places_of_neurons(layers, indices, (2, 5))


@pytest.mark.parametrize(
    ("layers", "indices", "message"),
    [(0, 99, r"\(0, 99\)"), (2, 0, r"below \(2, 64\); got \(2, 0\)"), (-1, 0, r"\(-1, 0\)"), (0, [], "no neuron")],
)
def test_neurons_that_are_not_there_are_named(model, layers, indices, message):
    held = collect_records(model, corpus(n=300), 8)
    for part in held, held.top:
        with pytest.raises(ValueError, match=message):
            part.neurons(layers, indices)
