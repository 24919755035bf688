import json
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_training import corpus, new_model
from torch import nn

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.ground_truth import match_concepts
from cratelab.interpret.records import collect_records
from cratelab.reading import hooked, watch_neurons
from cratelab.sae import Sae, SaeConfig, cross_entropy, evaluate_sae, on_residual, splice
from cratelab.storage import digest_of_tensors

WIDTH = 64  # neurons of the small models


@pytest.fixture(params=[cl.Crate, cl.Gpt2])
def model(request):
    return talkative(request.param)


def talkative(model=cl.Gpt2, n_layers: int = 2) -> cl.LanguageModel:
    """A small model whose neurons do something."""
    model = new_model(model, n_layers=n_layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def random_sae(d_in: int = WIDTH, expansion: float = 2, kind: str = "relu", **config) -> Sae:
    sae = Sae(SaeConfig(d_in, expansion, kind, **config))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_(std=0.3)
        if sae.architecture.has_threshold:
            sae.threshold.uniform_(0, 0.5)
    return sae


def perfect_sae() -> Sae:
    """x = ReLU(x) − ReLU(−x), two features a neuron."""
    sae = Sae(SaeConfig(WIDTH, 2))
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    return sae


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(19, shape or (3, 10))


# The auto-encoder


@settings(deadline=None, max_examples=25)
@given(
    batch=st.lists(st.integers(0, 4), max_size=3),
    d_in=st.integers(1, 9),
    features=st.integers(1, 20),
    kind=st.sampled_from(["relu", "batchtopk", "jumprelu"]),
)
def test_code_and_reconstruction_are_those_of_numpy_one_token_at_a_time(batch, d_in, features, kind):
    sae = random_sae(d_in, features / d_in, kind, k=1)
    x = torch.randn(*batch, d_in)
    code, back = sae.encode(x), sae(x)
    assert code.shape == (*batch, features) and back.shape == x.shape
    p = {name: tensor.detach().double().cpu().numpy() for name, tensor in sae.state_dict().items()}
    rows = zip(x.reshape(-1, d_in), code.reshape(-1, features), back.reshape(-1, d_in), strict=True)
    for one, its_code, its_back in rows:
        pre = [
            sum((float(one[i]) - p["b_dec"][i]) * p["W_enc"][i, j] for i in range(d_in)) + p["b_enc"][j]
            for j in range(features)
        ]
        expected = np.array([value if value > p["threshold"][j] else 0 for j, value in enumerate(pre)])
        near = np.abs(np.array(pre) - p["threshold"]) < 1e-5  # where rounding decides
        np.testing.assert_allclose(its_code.detach().cpu().numpy()[~near], expected[~near], atol=1e-5)
        again = its_code.detach().double().cpu().numpy() @ p["W_dec"] + p["b_dec"]
        np.testing.assert_allclose(its_back.detach().cpu().numpy(), again, atol=1e-5)


def test_rows_start_at_unit_length_and_the_encoder_as_their_transpose():
    sae = Sae(SaeConfig(24, 3))
    np.testing.assert_allclose(sae.W_dec.detach().cpu().square().sum(1), 1, rtol=1e-5)
    assert sae.W_enc.equal(sae.W_dec.mT) and sae.W_enc.shape == (24, 72)
    assert not sae.W_dec.equal(Sae(SaeConfig(24, 3)).W_dec)


@pytest.mark.parametrize(
    "config, complaint",
    [
        (dict(d_in=8, kind="gated"), "kind must be one of relu, batchtopk, jumprelu, topk; got 'gated'"),
        (dict(d_in=8, kind="topk", k=129), "k must be 1 to 128, the number of features; got 129"),
        (dict(d_in=0), "d_in=0"),
        (dict(d_in=8, expansion=0.01), "0 features"),
        (dict(d_in=8, l1=float("nan")), "l1=nan"),
        (dict(d_in=8, l1=float("inf")), "l1=inf"),
        (dict(d_in=8, l1="much"), "l1='much'"),
        (dict(d_in=8.0), "d_in=8.0"),
        (dict(d_in=True), "d_in=True"),
        (dict(d_in=10**400), "d_in=1000"),
        (dict(d_in=8, expansion=float("inf")), "expansion=inf"),
        (dict(d_in=8, kind=["relu"]), "kind must be one of"),
        (dict(d_in=8, kind="batchtopk", k=129), "k must be 1 to 128, the number of features; got 129"),
    ],
)
def test_impossible_configurations_are_refused(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        SaeConfig(**config)


def test_a_tensor_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"reads 8 neurons; got a tensor \(3, 9\)"):
        Sae(SaeConfig(8)).encode(torch.zeros(3, 9))


# Splicing


def test_a_perfect_auto_encoder_changes_nothing(model):
    tokens = some_tokens()
    clean = model(tokens)
    with splice(model, {0: perfect_sae(), 1: perfect_sae()}):
        torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=1e-5)
        assert model.generate(tokens, 2, temperature=0).equal(model.generate(tokens, 2, temperature=0))


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_the_reconstruction_stands_in_place_of_the_neurons(model, layers):
    saes, tokens = {layer: random_sae() for layer in layers}, some_tokens()
    hooks = [
        model.blocks[layer].neurons.register_forward_hook(lambda m, i, x, layer=layer: saes[layer](x)) for layer in saes
    ]
    expected = model(tokens)
    for hook in hooks:
        hook.remove()
    clean = model(tokens)
    with splice(model, saes):
        spliced = model(tokens)
    torch.testing.assert_close(spliced, expected, atol=1e-5, rtol=1e-5)
    assert (spliced - clean).abs().max() > 0.1
    assert model(tokens).equal(clean)


@pytest.mark.parametrize("in_place", [False, True])
def test_with_the_error_term_only_edits_change_anything(model, in_place):
    sae, tokens = random_sae(), some_tokens()

    def edit(module, inputs, code):
        code = code if in_place else code.clone()
        code[..., 5] += 2
        return code

    with torch.no_grad():
        clean = model(tokens)
        with splice(model, {1: sae}, error_term=True):
            torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=1e-5)
            model.blocks[1].neurons.register_forward_hook(edit)
            edited = model(tokens)
        model.blocks[1].neurons.register_forward_hook(lambda m, i, x: x + 2 * sae.W_dec[5])
        torch.testing.assert_close(edited, model(tokens), atol=1e-4, rtol=1e-4)
        assert (edited - clean).abs().max() > 0.01


def test_the_site_is_an_identity_that_sees_the_code(model):
    sae, tokens, seen = random_sae(), some_tokens(), {}
    model.blocks[1].neurons.register_forward_hook(lambda m, i, x: seen.update(neurons=x))
    names, n_parameters, before = set(dict(model.named_modules())), model.count_parameters(), set(model.state_dict())
    with splice(model, {1: sae}):
        site = model.blocks[1].neurons
        assert isinstance(site, nn.Identity) and names <= set(dict(model.named_modules()))
        assert model.count_parameters() == n_parameters and set(model.state_dict()) == before
        site.register_forward_hook(lambda m, i, x: seen.update(code=x, into=i[0]))
        model(tokens)
        assert seen["code"].shape == (3, 10, 2 * WIDTH) and seen["code"] is seen["into"]
        assert seen["code"].equal(sae.encode(seen["neurons"]))
    assert set(dict(model.named_modules())) == names


def test_generation_with_its_cache_is_that_without(model):
    tokens = some_tokens(2, 4)
    with splice(model, {0: random_sae(), 1: random_sae(kind="jumprelu")}):
        found, expected = model.generate(tokens, 7, temperature=0), tokens
        for _ in range(7):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert found.equal(expected)


def test_the_model_is_restored_whatever_happens(model):
    sites, tokens = [block.neurons for block in model.blocks], some_tokens()
    clean = model(tokens)
    with pytest.raises(RuntimeError, match="in the middle"), splice(model, {0: random_sae(), 1: random_sae()}):
        raise RuntimeError("in the middle")
    assert [block.neurons for block in model.blocks] == sites and model(tokens).equal(clean)


def test_what_does_not_fit_is_refused_before_anything_changes(model):
    sites = [block.neurons for block in model.blocks]
    for saes, complaint in (
        ({0: random_sae(), 2: random_sae()}, "layers 0 to 1; got 2"),
        ({0: random_sae(), -1: random_sae()}, "got -1"),
        ({0: random_sae(), 1: random_sae(32)}, "layer 1 has 64 neurons, its auto-encoder reads 32"),
    ):
        with pytest.raises(ValueError, match=complaint), splice(model, saes):
            pass
    assert [block.neurons for block in model.blocks] == sites


def codes_of(model, saes, text) -> torch.Tensor:
    """Of every token (l, n, m), encoded by hand from what a model with all earlier splices does, piece by piece."""
    codes = [[] for _ in model.blocks]

    def replace(layer):
        def hook(module, inputs, x):
            sae = saes[layer]
            code = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
            codes[layer].append(code[0])
            return code @ sae.W_dec + sae.b_dec

        return hook

    hooks = [block.neurons.register_forward_hook(replace(layer)) for layer, block in enumerate(model.blocks)]
    for index in range(text.n_documents):
        for piece in np.split(text.document(index), range(12, len(text.document(index)), 12)):
            model(torch.as_tensor(piece.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(each) for each in codes]).detach()


def test_records_and_matches_of_features_are_those_of_codes_made_by_hand(model):
    saes, text = {0: random_sae(), 1: random_sae()}, corpus(400)
    codes = codes_of(model, saes, text)
    truth = torch.rand(400, 5) < 0.3
    with splice(model, saes):
        records = collect_records(model, text, window=4, n_top=3, n_random=2)
        matches = match_concepts(model, text, Concepts(list("abcde"), truth))
    maximum = codes.amax(1)
    torch.testing.assert_close(records.maximum.float(), maximum.cpu(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(records.density.float(), (codes > 0).float().mean(1).cpu(), atol=0.003, rtol=0)
    torch.testing.assert_close(records.mean.float(), codes.mean(1).cpu(), atol=1e-5, rtol=1e-4)
    live = maximum.cpu() > 0
    places = (records.top.starts + records.top.offsets)[:, None, :, 0]
    there = codes.cpu().gather(1, places.clamp(min=0))[:, 0]
    torch.testing.assert_close(there[live], maximum.cpu()[live], atol=1e-5, rtol=1e-4)
    document = np.repeat(np.arange(text.n_documents), [len(text.document(i)) for i in range(text.n_documents)])
    odd = torch.from_numpy(document % 2 == 1)
    judged = codes.cpu()[:, odd]
    on_best = (judged * truth.cpu()[odd].float().mT[matches.best.clamp(min=0)].permute(0, 2, 1)).sum(1)
    live = codes.cpu()[:, ~odd].amax(1) > 0
    known = live & (judged.sum(1) > 0)
    torch.testing.assert_close(matches.purity[known], (on_best / judged.sum(1))[known], atol=1e-4, rtol=1e-3)
    assert known.any() and (matches.best[~live] == -1).all()


# Scores


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_scores_are_those_of_brute_force(model, kind):
    sae, text = random_sae(kind=kind), corpus(400)
    (scores,) = evaluate_sae(model, text, {1: sae}, batch=7).values()
    xs, nats = [], {"clean": [], "spliced": [], "zero": []}
    edits = {"clean": lambda x: x, "spliced": sae, "zero": torch.zeros_like}
    for index in range(text.n_documents):
        for piece in np.split(text.document(index), range(12, len(text.document(index)), 12)):
            tokens = torch.as_tensor(piece.astype(np.int64))
            for name, edit in edits.items():
                site = model.blocks[1].neurons
                hooks = [site.register_forward_hook(lambda m, i, x, edit=edit: edit(x))]
                if name == "clean":
                    hooks.append(site.register_forward_hook(lambda m, i, x: xs.append(x[0].double())))
                with torch.no_grad():
                    log_p = model(tokens[None])[0].double().log_softmax(-1)
                nats[name] += [-float(log_p[at, tokens[at + 1]]) for at in range(len(tokens) - 1)]
                for hook in hooks:
                    hook.remove()
    x = torch.cat(xs).detach()
    code = sae.encode(x.float()).detach().double()
    back = sae(x.float()).detach().double()
    assert scores.n_tokens == len(x) == 400
    assert scores.l0 == pytest.approx(float((code > 0).sum(1).double().mean()), rel=1e-3)
    np.testing.assert_allclose(scores.density.cpu(), (code > 0).double().mean(0).cpu(), atol=0.006)
    variance = 1 - float((x - back).square().sum() / (x - x.mean(0)).square().sum())
    assert scores.explained_variance == pytest.approx(variance, rel=1e-4)
    for name, expected in nats.items():
        assert getattr(scores, f"ce_{name}") == pytest.approx(np.mean(expected), abs=1e-4)
    recovered = (np.mean(nats["zero"]) - np.mean(nats["spliced"])) / (np.mean(nats["zero"]) - np.mean(nats["clean"]))
    assert scores.recovered == pytest.approx(recovered, rel=1e-2)
    assert scores.dead == float((scores.density == 0).double().mean())
    counts, edges = scores.histogram()
    live = scores.density.cpu().numpy()
    live = live[live > 0]
    assert counts.sum() == len(live) and edges[-1] == 0
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        inside = (live >= 10**low) & ((live < 10**high) | (high == 0))
        assert abs(count - inside.sum()) <= (np.isclose(live, 10**low) | np.isclose(live, 10**high)).sum()


def test_the_first_token_of_a_piece_can_be_left_out(model):
    sae, text = random_sae(), corpus(400)
    with torch.no_grad():
        model.position_embedding.weight[0] *= 100
    rest = []
    for batch, layers in watch_neurons(model, text):
        inside = batch.present.clone()
        inside[:, 0] = False
        rest.append(layers[1][inside])
    x = torch.cat(rest)
    back = sae(x).detach().double()
    left = 1 - float((x - back).square().sum() / (x.double() - x.double().mean(0)).square().sum())
    whole, without = (evaluate_sae(model, text, {1: sae}, first=first)[1] for first in (True, False))
    assert without.explained_variance == pytest.approx(left, rel=1e-4) and without.n_tokens == len(x) < whole.n_tokens
    assert without.l0 == pytest.approx(float((sae.encode(x) > 0).sum(1).double().mean()), rel=1e-3)
    assert abs(whole.explained_variance - left) > 0.01
    assert (whole.ce_clean, whole.ce_spliced, whole.ce_zero) == (without.ce_clean, without.ce_spliced, without.ce_zero)


def test_the_more_text_is_read_the_fewer_features_are_dead(model):
    dead = [evaluate_sae(model, corpus(400), {1: random_sae()}, n_tokens=n)[1].dead for n in (2, 20, 400)]
    assert dead[0] > dead[1] > dead[2]


def test_an_auto_encoder_that_returns_the_mean_explains_nothing_and_a_perfect_one_all():
    model, text = talkative(), corpus(400)
    neurons = [[] for _ in model.blocks]
    for batch, layers in watch_neurons(model, text):
        for each, activations in zip(neurons, layers, strict=True):
            each.append(activations[batch.present])
    mean = Sae(SaeConfig(WIDTH))
    with torch.no_grad():
        mean.W_dec.zero_()
        mean.b_dec.copy_(torch.cat(neurons[0]).double().mean(0))
    scores = evaluate_sae(model, text, {0: mean, 1: perfect_sae()})
    assert scores[0].explained_variance == pytest.approx(0, abs=1e-6)
    assert scores[1].explained_variance == pytest.approx(1, abs=1e-6)
    assert scores[1].ce_spliced == pytest.approx(scores[1].ce_clean, abs=1e-5)
    assert scores[1].recovered == pytest.approx(1, abs=1e-3)
    assert scores[1].dead >= 0.5  # neurons are never negative


def test_cross_entropy_prices_a_splice_of_several_layers(model):
    text, saes = corpus(300), {0: random_sae(), 1: random_sae()}
    scores = evaluate_sae(model, text, {1: saes[1]}, batch=5)[1]
    assert cross_entropy(model, text) == pytest.approx(scores.ce_clean, abs=1e-5)
    with splice(model, {1: saes[1]}):
        assert cross_entropy(model, text) == pytest.approx(scores.ce_spliced, abs=1e-5)
    part = cross_entropy(model, text, n_tokens=100)
    assert part != pytest.approx(scores.ce_clean, abs=1e-3)
    assert evaluate_sae(model, text, saes, n_tokens=100)[0].n_tokens == 100


def test_the_residual_stream_is_what_blocks_give(model):
    text, sae, weights = corpus(60), random_sae(model.config.width), digest_of_tensors(model.state_dict())
    view = on_residual(model)
    assert view.config.n_neurons == model.config.width
    streams: list[torch.Tensor] = []
    for read, seen in watch_neurons(view, text):
        tokens = read.tokens.clamp(min=0)
        streams.clear()
        with hooked(*((block, lambda module, inputs, x: streams.append(x)) for block in model.blocks)):
            expected = model(tokens)
        torch.testing.assert_close(torch.stack(seen), torch.stack(streams))
        torch.testing.assert_close(view(tokens), expected)
    with hooked((model.blocks[0], lambda module, inputs, x: sae(x))):
        expected = model(tokens)
    with splice(view, {0: sae}):
        torch.testing.assert_close(view(tokens), expected)
    assert digest_of_tensors(model.state_dict()) == weights


def test_a_corpus_with_other_tokens_or_none_to_predict_is_refused(model):
    other = TokenizedCorpus.from_arrays(np.arange(30), np.zeros(30, int), ["a"], 30)
    for measure in (lambda: cross_entropy(model, other), lambda: evaluate_sae(model, other, {0: random_sae()})):
        with pytest.raises(ValueError, match="30 tokens, the model knows 19"):
            measure()
    for measure in (lambda: cross_entropy(model, corpus(), 1), lambda: evaluate_sae(model, corpus(), {}, 1)):
        with pytest.raises(ValueError, match="first 1 tokens of the corpus hold none that follows another"):
            measure()


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_models_and_auto_encoders_of_every_precision_fit(model, dtype, tolerance, sae_dtype):
    tokens, text, saes = some_tokens(), corpus(200), {0: random_sae(), 1: random_sae(kind="jumprelu")}
    tolerance = max(tolerance, 0.05 if sae_dtype == torch.bfloat16 else 0)
    with splice(model, {0: saes[0]}), torch.no_grad():
        expected = model(tokens)
    scores, priced = evaluate_sae(model, text, saes), cross_entropy(model, text)
    model.to(dtype)
    saes = {layer: sae.to(sae_dtype) for layer, sae in saes.items()}
    for error_term in False, True:
        with splice(model, {0: saes[0]}, error_term), torch.no_grad():
            logits = model(tokens)
        assert logits.dtype == dtype
        if not error_term:
            torch.testing.assert_close(logits, expected, atol=3 * tolerance, rtol=tolerance, check_dtype=False)
    assert cross_entropy(model, text) == pytest.approx(priced, rel=tolerance)
    for layer, found in evaluate_sae(model, text, saes).items():
        for name in "l0", "explained_variance", "ce_clean", "ce_spliced", "ce_zero":
            assert getattr(found, name) == pytest.approx(getattr(scores[layer], name), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("n_tokens, batch", [(0, 16), (-5, 16), (float("nan"), 16), (None, 0), (None, 1.5)])
def test_to_read_nothing_is_refused(n_tokens, batch):
    for measure in evaluate_sae, cross_entropy:
        arguments = {"saes": {0: random_sae()}} if measure is evaluate_sae else {}
        with pytest.raises(ValueError, match=r"(n_tokens|batch) must be at least 1, a whole number"):
            measure(talkative(), corpus(), **arguments, n_tokens=n_tokens, batch=batch)


def test_what_is_no_auto_encoder_is_named():
    for what in None, torch.nn.Identity():
        with pytest.raises(ValueError, match="layer 0 needs an auto-encoder; got"), splice(talkative(), {0: what}):
            pass


# Files


@pytest.mark.parametrize("kind", ["relu", "batchtopk", "jumprelu", "topk"])
@pytest.mark.parametrize("expansion", [2, 1.3])
def test_what_is_saved_comes_back(tmp_path, kind, expansion):
    sae = random_sae(24, expansion, kind, l1=0.5, k=3)
    sae.save(tmp_path / "new", model_name="toy")
    again = Sae.load(tmp_path / "new")
    assert again.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def rewrite(folder, weights=None, **changes):
    """Change the tensors and the settings of a saved auto-encoder; None removes."""
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if value is not None}))
    held = load_file(folder / "sae_weights.safetensors") | (weights or {})
    save_file({name: t for name, t in held.items() if t is not None}, folder / "sae_weights.safetensors")


def test_one_that_does_not_subtract_the_bias_does_the_same_here(tmp_path):
    sae, x = random_sae(24), torch.randn(5, 24)
    sae.save(tmp_path)
    rewrite(tmp_path, apply_b_dec_to_input=False, metadata=None)
    torch.testing.assert_close(Sae.load(tmp_path).encode(x), torch.relu(x @ sae.W_enc + sae.b_enc))


@torch.no_grad()
def code_of_the_largest(pre, k):
    """The code of pre-activations (n, m), token by token and feature by feature."""
    code = torch.zeros_like(pre)
    for token, row in enumerate(pre.tolist()):
        for feature in sorted(range(len(row)), key=row.__getitem__)[-k:]:
            code[token, feature] = max(row[feature], 0)
    return code


def test_a_topk_keeps_the_k_largest_of_each_token():
    sae, x = random_sae(24, 2, "topk", k=20), torch.randn(4, 5, 24)
    pre = (x.flatten(0, 1) - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = code_of_the_largest(pre, 20)
    assert (expected > 0).sum(1).min() < 20  # those that are negative count nothing
    torch.testing.assert_close(sae.encode(x).flatten(0, 1), expected)


def test_a_topk_that_ranks_by_the_decoders_lengths_does_the_same_here(tmp_path):
    sae, x = random_sae(24, 2, "topk", k=3), torch.randn(50, 24)
    sae.W_dec.data *= torch.rand(48, 1) * 3 + 0.1
    sae.save(tmp_path)
    rewrite(tmp_path, rescale_acts_by_decoder_norm=True)
    lengths = sae.W_dec.square().sum(1).sqrt()
    expected = code_of_the_largest(((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * lengths, 3)
    assert not (expected > 0).equal(sae.encode(x) > 0)  # the lengths matter
    again = Sae.load(tmp_path)
    torch.testing.assert_close(again.encode(x), expected)
    torch.testing.assert_close(again(x), (expected / lengths) @ sae.W_dec + sae.b_dec)
    sae.W_dec.data[7] = 0  # a feature that says nothing
    sae.save(tmp_path)
    rewrite(tmp_path, rescale_acts_by_decoder_norm=True)
    assert not Sae.load(tmp_path).encode(x)[:, 7].any()


def test_a_topk_whose_file_names_two_numbers_is_refused(tmp_path):
    random_sae(24, 2, "topk", k=3).save(tmp_path)
    rewrite(tmp_path, k=4)
    with pytest.raises(ValueError, match=r"contradicts itself: .*k=3.*'k': 4"):
        Sae.load(tmp_path)


def test_half_precision_comes_back_in_single(tmp_path):
    sae = random_sae(24)
    sae.save(tmp_path)
    rewrite(tmp_path, {name: tensor.bfloat16() for name, tensor in sae.state_dict().items() if name != "threshold"})
    again = Sae.load(tmp_path)
    assert again.W_enc.dtype == torch.float32 and again.W_enc.equal(sae.W_enc.bfloat16().float())


@pytest.mark.parametrize(
    "weights, changes, complaint",
    [
        (
            {},
            dict(architecture="gated"),
            "cfg.json has the architecture 'gated'; this reads standard and jumprelu and topk",
        ),
        ({}, dict(architecture="topk", metadata={}), "describes no auto-encoder: k must be a number"),
        ({}, dict(architecture="topk", metadata={}, k=49), "describes no auto-encoder: k must be 1 to 48"),
        ({}, dict(architecture="topk", k=3), "cfg.json contradicts itself"),
        ({}, dict(architecture=["standard"]), "cfg.json has the architecture"),
        ({}, dict(architecture="jumprelu"), "cfg.json contradicts itself"),
        ({}, dict(architecture="jumprelu", metadata={}), "weights.safetensors holds .* it should hold .*'threshold'"),
        ({}, dict(normalize_activations="layer_norm"), "cfg.json asks for .* normalize_activations='layer_norm'"),
        ({}, dict(activation_fn_str="topk"), "cfg.json asks for .* activation_fn_str='topk'"),
        ({}, dict(activation_fn="topk"), "activation_fn='topk'"),
        ({}, dict(activation_fn="tanh-relu"), "activation_fn='tanh-relu'"),
        ({}, dict(activation_fn_kwargs={"k": 3}), "activation_fn_kwargs={'k': 3}"),
        ({}, dict(finetuning_scaling_factor=True), "finetuning_scaling_factor=True"),
        ({}, dict(rescale_acts_by_decoder_norm=True), "rescale_acts_by_decoder_norm=True"),
        ({}, dict(use_error_term=True), "use_error_term=True"),
        ({}, dict(apply_b_dec_to_input="false"), "apply_b_dec_to_input='false'"),
        ({}, dict(apply_b_dec_to_input=0), "apply_b_dec_to_input=0"),
        ({}, dict(normalize_activations="constant_norm_rescale"), "normalize_activations='constant_norm_rescale'"),
        ({}, dict(normalize_activations=True), "normalize_activations=True"),
        ({}, dict(reshape_activations="hook_z"), "reshape_activations='hook_z'"),
        ({}, dict(reshape_activations=None, hook_name="blocks.0.attn.hook_z"), "reshape_activations='hook_z'"),
        ({}, dict(dtype="int8"), "dtype='int8'"),
        ({}, dict(k=4), "k=4"),
        ({}, dict(d_out=24), "d_out=24"),
        ({}, dict(a_setting_of_tomorrow=1), "a_setting_of_tomorrow=1"),
        ({}, dict(architecture="transcoder"), "has the architecture 'transcoder'"),
        ({}, dict(d_in=True), "positive integers; got True"),
        ({}, dict(d_sae=48.0), "positive integers; got 24 and 48.0"),
        ({}, dict(metadata={"cratelab": {"d_in": 24, "expansion": 10**400}}), "cfg.json describes no auto-encoder"),
        ({}, dict(d_sae=10**400, metadata={}), "cfg.json describes no auto-encoder"),
        ({"b_enc": torch.zeros(48, dtype=torch.int32)}, {}, r"must hold numbers of float32.*got b_enc torch\.int32"),
        ({"b_enc": torch.zeros(48, dtype=torch.bool)}, {}, r"got b_enc torch\.bool"),
        ({"b_enc": torch.zeros(48, dtype=torch.complex64)}, {}, r"got b_enc torch\.complex64"),
        ({"b_enc": torch.full((48,), 1e300, dtype=torch.float64)}, {}, "weights.safetensors is damaged: .* b_enc"),
        ({}, dict(d_in="24"), "cfg.json must give d_in and d_sae as positive integers; got '24' and 48"),
        ({}, dict(d_sae=-1), "positive integers; got 24 and -1"),
        ({}, dict(d_sae=None), "positive integers; got 24 and None"),
        ({}, dict(d_sae=47, metadata=None), r"weights.safetensors holds .*'W_enc': \(24, 47\)"),
        ({}, dict(metadata={"cratelab": {"size": 3}}), "cfg.json describes no auto-encoder: .*'size'"),
        ({}, dict(metadata={"cratelab": [1]}), "cfg.json describes no auto-encoder"),
        ({"b_dec": None}, {}, "weights.safetensors holds"),
        ({"scale": torch.ones(1)}, {}, "weights.safetensors holds"),
        ({"b_enc": torch.zeros(47)}, {}, r"weights.safetensors holds .*\(47,\)"),
        ({"b_enc": torch.full((48,), float("nan"))}, {}, "weights.safetensors is damaged: .* b_enc"),
    ],
)
def test_foreign_files_that_do_not_fit_are_refused(tmp_path, weights, changes, complaint):
    random_sae(24).save(tmp_path)
    rewrite(tmp_path, weights, **changes)
    with pytest.raises(ValueError, match=complaint):
        Sae.load(tmp_path)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    sae = random_sae(24)
    sae.save(tmp_path)
    named = dict(hook_name="blocks.3.mlp.hook_post", hook_layer=3, model_name="gpt2-small", prepend_bos=True)
    plain = dict(
        activation_fn_str="relu", activation_fn_kwargs={}, finetuning_scaling_factor=False, dtype="torch.float32"
    )
    rewrite(tmp_path, **named, **plain, normalize_activations=False, context_size=128, l1_coefficient=5.0)
    assert Sae.load(tmp_path).W_enc.equal(sae.W_enc)


def test_sizes_are_not_believed_before_the_weights_are_seen(tmp_path, monkeypatch):
    random_sae(24).save(tmp_path)
    rewrite(tmp_path, d_sae=60_000_000, metadata=None)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: pytest.fail(f"made {shape}"))
    with pytest.raises(ValueError, match=r"weights.safetensors holds .*'W_enc': \(24, 48\).*\(24, 60000000\)"):
        Sae.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_of_another_dtype_is_saved_as_such(tmp_path, dtype):
    sae = random_sae(24).to(dtype)
    sae.save(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert Sae.load(tmp_path).W_enc.equal(sae.W_enc.float())


ODD = None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", [], [1], {}, {"k": 1}


def test_whatever_a_folder_holds_only_errors_that_name_it_come_out(tmp_path):
    """Settings of odd values, bytes flipped, files cut short: seeded, and each is loaded right or refused by name."""
    draw, folder, whole, refused = random.Random(0), tmp_path / "an auto-encoder", [], 0
    for kind in "relu", "batchtopk", "jumprelu", "topk":
        random_sae(4, 2, kind, k=2).save(folder)
        whole.append({file: file.read_bytes() for file in folder.iterdir()})
    for trial in range(150):
        for file, content in whole[trial % 3].items():
            file.write_bytes(content)
        file = folder / draw.choice(["cfg.json", "cfg.json", "sae_weights.safetensors"])
        content = bytearray(file.read_bytes())
        how = draw.choice(["value", "flip", "cut", "zero"])
        if file.suffix == ".json" and how == "value":
            cfg = json.loads(content)
            place = cfg["metadata"]["cratelab"] if draw.random() < 0.4 else cfg
            name = draw.choice([*place, "extra"])
            if draw.random() < 0.1 and name in place:
                del place[name]
            else:
                place[name] = draw.choice(ODD)
            content = json.dumps(cfg).encode()
        elif how == "cut":
            content = content[: draw.randrange(len(content))]
        elif how == "zero":
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        else:
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            assert all(tensor.isfinite().all() for tensor in Sae.load(folder).state_dict().values())
        except (ValueError, OSError) as error:
            assert "an auto-encoder" in str(error), error
            refused += 1
    assert refused > 70


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "another", "missing"])
def test_damaged_files_are_named(tmp_path, name, damage):
    random_sae(24).save(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Sae.load(tmp_path)
        return
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else pickle.dumps({"W_enc": 1}))
    with pytest.raises(ValueError, match=name):
        Sae.load(tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    old = random_sae(24)
    old.save(tmp_path)

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("cratelab.storage.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        random_sae(24).save(tmp_path)
    assert Sae.load(tmp_path).W_enc.equal(old.W_enc)


def write_as_sparsify(folder, weights=None, **changes) -> dict[str, torch.Tensor]:
    """What SparseCoder.save_to_disk writes of 24 neurons and 48 features."""
    tensors = {"encoder.weight": (48, 24), "encoder.bias": (48,), "W_dec": (48, 24), "b_dec": (24,)}
    tensors = {name: torch.randn(shape) for name, shape in tensors.items()} | (weights or {})
    cfg = dict(activation="topk", expansion_factor=2, normalize_decoder=True, num_latents=0, k=4, multi_topk=False)
    cfg |= dict(skip_connection=False, transcode=False, d_in=24) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return tensors


@pytest.mark.parametrize("sizes", [{}, dict(num_latents=48, expansion_factor=32)])
def test_one_of_sparsify_computes_what_its_authors_define(tmp_path, sizes):
    w = write_as_sparsify(tmp_path, **sizes)
    sae, x = Sae.from_sparsify(tmp_path), torch.randn(3, 5, 24)
    code = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    code = torch.where(code >= code.topk(4).values[..., -1:], code, 0).relu()
    torch.testing.assert_close(sae.encode(x), code, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), code @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=1e-5)
    assert sae.config == SaeConfig(24, 2, "topk", k=4)
    sae.save(tmp_path / "ours")
    assert Sae.load(tmp_path / "ours")(x).equal(sae(x))


@pytest.mark.parametrize(
    "weights, changes, complaint",
    [
        ({}, dict(activation="groupmax"), "cfg.json asks for .* activation='groupmax'"),
        ({}, dict(transcode=True), "transcode=True"),
        ({}, dict(skip_connection=True), "skip_connection=True"),
        ({}, dict(signed=True), "signed=True"),
        ({}, dict(a_setting_of_tomorrow=1), "a_setting_of_tomorrow=1"),
        ({}, dict(k=49), "cfg.json describes no auto-encoder: k must be 1 to 48"),
        ({}, dict(k=None), "cfg.json describes no auto-encoder: .*k=None"),
        ({}, dict(d_in="24"), "cfg.json describes no auto-encoder: .*d_in='24'"),
        ({}, dict(d_in=0, num_latents=48), "cfg.json describes no auto-encoder"),
        ({}, dict(num_latents=10**400), "cfg.json describes no auto-encoder"),
        ({}, dict(num_latents=47), r"sae.safetensors holds .*it should hold .*\(47, 24\)"),
        ({"W_skip": torch.zeros(24, 24)}, {}, "sae.safetensors holds .*W_skip"),
        ({"W_dec": None}, {}, "sae.safetensors holds"),
        ({"b_dec": torch.zeros(24, dtype=torch.int32)}, {}, r"got b_dec torch\.int32"),
        ({"b_dec": torch.full((24,), float("nan"))}, {}, "sae.safetensors is damaged: .* b_dec"),
    ],
)
def test_what_sparsify_writes_and_we_do_not_do_is_refused(tmp_path, weights, changes, complaint):
    write_as_sparsify(tmp_path, weights, **changes)
    with pytest.raises(ValueError, match=complaint):
        Sae.from_sparsify(tmp_path)
