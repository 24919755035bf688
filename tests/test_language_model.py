import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import cratelab as cl

MODELS = [(cl.Crate, cl.CrateConfig), (cl.Gpt2, cl.Gpt2Config)]
both = pytest.mark.parametrize("model_class, config_class", MODELS, ids=["crate", "gpt2"])
SMALL = dict(n_layers=2, n_heads=2, width=16, vocab_size=50, context=12)


def small(model_class, config_class, **changes):
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # away from the quiet start, so that wrong code shows
    return model


def prompt(b=3, n=5):
    return torch.randint(50, (b, n))


@both
def test_logits_have_a_row_for_every_token_and_see_no_future(model_class, config_class):
    model, tokens = small(model_class, config_class), prompt()
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    assert logits.shape == (3, 5, 50)
    assert_close(model(changed)[:, :3], logits[:, :3])
    assert (model(changed)[:, 3:] - logits[:, 3:]).abs().amax((0, 2)).min() > 1e-4


@both
def test_every_parameter_gets_a_gradient(model_class, config_class):
    model = small(model_class, config_class)
    model(prompt(n=12)).logsumexp(-1).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # forward-mode AD's own
@both
def test_gradients_a_sample_and_second_derivatives(model_class, config_class):
    """By `torch.func`, against one backward pass a sample and against two backward passes."""
    model, tokens = small(model_class, config_class, n_layers=1, width=8).double(), prompt(n=4)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = "blocks.0.attention.projection.weight"

    def value(parameters, tokens):
        return torch.func.functional_call(model, parameters, (tokens,)).square().mean()

    each = torch.func.vmap(torch.func.grad(lambda *of: value(of[0], of[1][None])), (None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row[None]).square().mean().backward()
        assert_close({key: of[i] for key, of in each.items()}, {k: p.grad for k, p in model.named_parameters()})

    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fast attention has no second derivatives
        weight = dict(model.named_parameters())[name]
        (slope,) = torch.autograd.grad(model(tokens).square().mean(), weight, create_graph=True)
        curvature = torch.autograd.grad(slope.sum(), weight)[0]
    of_slope = torch.func.jvp(
        torch.func.grad(lambda weight: value(parameters | {name: weight}, tokens)),
        (parameters[name],),
        (torch.ones_like(weight),),
    )
    assert curvature.any()
    assert_close(of_slope, (slope.detach(), curvature))


@both
def test_shapes_alone_pass_through_the_meta_device(model_class, config_class):
    with torch.device("meta"):
        model = model_class(config_class(**SMALL))
        logits = model(torch.zeros(3, 5, dtype=torch.long))
        logits.sum().backward()
    assert logits.is_meta and logits.shape == (3, 5, 50)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@both
def test_neurons_see_every_activation_and_may_be_edited(model_class, config_class):
    model, tokens, seen = small(model_class, config_class), prompt(), []
    clean = model(tokens)
    hooks = [block.neurons.register_forward_hook(lambda *args: seen.append(args[-1])) for block in model.blocks]
    model(tokens)
    assert [tuple(neurons.shape) for neurons in seen] == [(3, 5, 64)] * 2
    assert all((neurons >= 0).all() and (neurons > 0).any() for neurons in seen)
    for hook in hooks:
        hook.remove()
    edit = model.blocks[1].neurons.register_forward_hook(lambda module, args, neurons: neurons + 1.0)
    assert (model(tokens) - clean).abs().max() > 1e-3
    edit.remove()
    assert_close(model(tokens), clean)


@both
def test_cached_logits_are_the_uncached_ones(model_class, config_class):
    model, tokens = small(model_class, config_class), prompt(n=12)
    cache = model.new_cache(3)
    steps = [model(tokens[:, :4], cache)] + [model(tokens[:, i : i + 1], cache, i) for i in range(4, 12)]
    assert_close(torch.cat(steps, 1), model(tokens))


def test_crate_remembers_one_tensor_a_layer_and_gpt2_two():
    sizes = []
    for model_class, config_class in MODELS:
        cache = small(model_class, config_class).new_cache(3)
        assert len(cache) == 2
        sizes.append(sum(tensor.numel() for tensor in cache))
    assert sizes == [2 * 3 * 12 * 16, 2 * 2 * 3 * 12 * 16]


@both
def test_greedy_generation_is_the_uncached_argmax_even_past_the_context(model_class, config_class):
    model, tokens = small(model_class, config_class), prompt()
    with pytest.warns(UserWarning, match="do not fit the context of 12"):
        generated = model.generate(tokens, n_new=14, temperature=0)
    for _ in range(14):
        tokens = torch.cat([tokens, model(tokens[:, -12:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert_close(generated, tokens)


def test_generation_up_to_the_context_needs_no_warning():
    model = small(*MODELS[0])
    assert model.generate(prompt(), n_new=8, seed=0).shape == (3, 13)  # warnings are errors here
    with pytest.warns(UserWarning, match="14 tokens do not fit the context of 12"):
        model.generate(prompt(), n_new=9, seed=0)


@both
def test_generation_encodes_each_token_once_and_keeps_no_graph(model_class, config_class):
    model, seen = small(model_class, config_class), []
    model.blocks[0].neurons.register_forward_hook(lambda *args: seen.append(args[-1]))
    model.generate(prompt(), n_new=8, seed=0)
    assert [neurons.shape[1] for neurons in seen] == [5, 1, 1, 1, 1, 1, 1, 1]
    assert not any(neurons.requires_grad for neurons in seen)


@both
def test_same_seed_same_text_other_seed_other_text(model_class, config_class):
    model, tokens = small(model_class, config_class), prompt()
    first = model.generate(tokens, 7, seed=0)
    assert_close(model.generate(tokens, 7, seed=0, temperature=1.0, top_k=1000), first)
    assert (model.generate(tokens, 7, seed=1) != first).any()


def test_samples_follow_the_softmax_at_the_temperature():
    model = small(*MODELS[0])
    tokens = prompt(b=1).expand(20_000, -1)
    new = model.generate(tokens, 1, temperature=0.7, top_k=5, seed=0)[:, -1]
    top = model(tokens[:1])[0, -1].topk(5)
    expected = torch.zeros(50).scatter(0, top.indices, (top.values.detach() / 0.7).softmax(-1))
    assert_close(new.bincount(minlength=50) / 20_000, expected, atol=0.015, rtol=0)
    assert set(new.tolist()) <= set(top.indices.tolist())


def test_a_stop_token_ends_its_row_and_all_stopped_end_the_call():
    model, tokens = small(*MODELS[0], vocab_size=5), torch.randint(5, (3, 5))
    free = model.generate(tokens, 7, seed=3).tolist()
    for stop in range(5):
        ends = [row.index(stop, 5) if stop in row[5:] else 11 for row in free]
        expected = [row[: end + 1] + [stop] * (max(ends) - end) for row, end in zip(free, ends, strict=True)]
        assert model.generate(tokens, 7, seed=3, stop=stop).tolist() == expected


def test_wrong_tokens_are_named():
    model = small(*MODELS[0])
    for wrong, message in [
        (torch.zeros(3, 5), "torch.float32"),
        (torch.zeros(3, 5, dtype=torch.uint16), "of int32 or int64; got torch.uint16"),
        (torch.zeros(5, dtype=torch.long), r"\(5,\)"),
        (torch.zeros(3, 0, dtype=torch.long), r"\(3, 0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(wrong)
        with pytest.raises(ValueError, match=message):
            model.generate(wrong, 1)
    with pytest.raises(ValueError, match="context is 12 tokens; got 13"):
        model(prompt(n=13))
    with pytest.raises(ValueError, match="context is 12 tokens; got 13"):
        model(prompt(n=1), model.new_cache(3), position=12)
    for n, cache, position in [(2, model.new_cache(3), 4), (1, None, 4), (1, model.new_cache(3), -1)]:
        with pytest.raises(ValueError, match="one token at a time"):
            model(prompt(n=n), cache, position)
    for low, high in (0, 50), (-1, 49):
        with pytest.raises(ValueError, match=rf"\[0, 50\); got {low} to {high}"):
            model.generate(torch.tensor([[low, high]]), 1)
    for wrong in {"n_new": -1}, {"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}:
        with pytest.raises(ValueError, match="generate needs"):
            model.generate(prompt(), **{"n_new": 1} | wrong)


@both
def test_a_saved_model_comes_back_the_same(model_class, config_class, tmp_path):
    model, tokens = small(model_class, config_class, expansion=2), prompt()
    model.save(tmp_path / "new" / "folder")
    loaded = cl.load(tmp_path / "new" / "folder").to(tokens.device)
    assert type(loaded) is model_class and loaded.config == model.config and not loaded.training
    assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupted_save_leaves_the_old_model(monkeypatch, tmp_path):
    def interrupted(weights, path, metadata=None):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    model, tokens = small(*MODELS[0]), prompt()
    model.save(tmp_path)
    monkeypatch.setattr("cratelab.storage.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(*MODELS[0], n_layers=1).save(tmp_path)
    assert_close(cl.load(tmp_path).to(tokens.device)(tokens), model(tokens), rtol=0, atol=0)


def test_damaged_folders_are_refused_by_name(tmp_path):
    small(*MODELS[0]).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 32}))
    with pytest.raises(ValueError, match=r"token_embedding.weight is \(50, 16\), expected \(50, 32\)"):
        cl.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
    with pytest.raises(ValueError, match=r"missing blocks.2.ista.weight \(64, 16\)"):
        cl.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 1}))
    with pytest.raises(ValueError, match=r"unexpected blocks.1.ista.weight"):
        cl.load(tmp_path)
    for broken, message in [
        (json.dumps(config | {"model": "Bert"}), "'Bert'; known are Crate, Gpt2"),
        (json.dumps(config | {"model": ["Crate"]}), r"\['Crate'\]; known are Crate, Gpt2"),
        (json.dumps(config | {"colour": "red"}), "colour"),
        (json.dumps(config | {"expansion": "4"}), r"config\.json does not fit Crate"),
        (json.dumps(config | {"context": 10**14}), r"config\.json does not fit Crate"),
        ("[1, 2]", r"config\.json must hold a JSON object; got list"),
        ('{"model"', r"config\.json is not JSON"),
        ("[" * 100_000, r"config\.json is not JSON"),
    ]:
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            cl.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        cl.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        cl.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cl.load(tmp_path / "nowhere")


def test_presets_are_the_sizes_of_the_paper():
    sizes = {"1L": (1, 4, 128), "2L": (2, 4, 128), "3L": (3, 4, 128), "S": (6, 12, 768), "B": (12, 12, 768)}
    for name, (layers, heads, width) in sizes.items():
        assert cl.CrateConfig.preset(name) == cl.CrateConfig(layers, heads, width, vocab_size=50_304, context=1024)


@both
def test_presets_and_sizes_are_checked(model_class, config_class):
    assert cl.CrateConfig.preset("S", lam=0.5).lam == 0.5
    with pytest.raises(ValueError, match="no preset 'M'; there are toy, 1L, 2L, 3L, S, B"):
        config_class.preset("M")
    for name in "n_layers", "context", "expansion":
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            config_class.preset("toy", **{name: 0})
    with pytest.raises(ValueError, match="multiple of the heads"):
        config_class.preset("toy", n_heads=3)


def test_a_subclass_is_saved_as_the_model_that_load_knows(tmp_path):
    class Sharded(cl.Crate):
        pass

    model = Sharded(cl.CrateConfig.preset("toy"))
    model.save(tmp_path)
    again = cl.load(tmp_path)
    assert type(again) is cl.Crate and model.kind == again.kind == "Crate"
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())
