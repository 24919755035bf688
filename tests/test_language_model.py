import json
import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import cratelab as cl
from cratelab.weights import renamed

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


def same_weights(a, b) -> bool:
    ours, theirs = ({name: tensor.cpu() for name, tensor in model.state_dict().items()} for model in (a, b))
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


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
@pytest.mark.parametrize("span", [0, 1, 3])
def test_a_layer_looks_back_over_its_span_and_no_further(model_class, config_class, span, tmp_path):
    """By the derivative of every logit by every embedding; and generated with a cache as without."""
    model = small(model_class, config_class, span=span)
    n, reach = 9, span * model.config.n_layers
    embedded = model.token_embedding(prompt(1, n)[0]).detach()
    with sdpa_kernel(SDPBackend.MATH):

        def logits(x):
            x = x[None] + model.position_embedding.weight[:n]
            for block in model.blocks:
                x = block(x)
            return model.norm(x)[0]

        moved = torch.autograd.functional.jacobian(logits, embedded).abs().amax((1, 3)) > 0
    back = torch.arange(n)[:, None] - torch.arange(n)
    assert (moved == ((back >= 0) & (back <= reach))).all()
    tokens = prompt(2, 4)
    uncached = tokens
    for _ in range(6):
        uncached = torch.cat([uncached, model(uncached)[:, -1:].argmax(-1)], 1)
    assert model.generate(tokens, 6, temperature=0).equal(uncached)
    model.save(tmp_path)
    assert cl.load(tmp_path).config.span == span


@both
def test_a_span_as_long_as_the_context_is_no_limit(model_class, config_class):
    free, far = (small(model_class, config_class, span=span) for span in (None, SMALL["context"]))
    tokens = prompt(2, 12)
    assert_close(free(tokens), far(tokens))


@both
@pytest.mark.parametrize("span", [-1, True, 2.0, "2"])
def test_an_impossible_span_is_refused(model_class, config_class, span):
    with pytest.raises(ValueError, match="span must be a number of tokens, 0 or more, or None"):
        config_class(**SMALL, span=span)


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


@pytest.mark.parametrize("top_k", [1, 3])
def test_exactly_k_tokens_are_drawn_from_even_among_equals(top_k):
    model = small(*MODELS[0])
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()  # all logits are 0
    for dtype in torch.float32, torch.bfloat16, torch.float16, torch.float64:
        drawn = model.to(dtype).generate(prompt(b=200), 1, top_k=top_k, seed=0)[:, -1]
        assert drawn.unique().tolist() == list(range(top_k))
    assert model.generate(prompt(), 3, temperature=0)[:, 5:].eq(0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_temperature_close_to_zero_is_that_of_zero(temperature, dtype):
    model, tokens = small(*MODELS[0]).to(dtype), prompt()
    with torch.no_grad():
        model.norm.weight.mul_(100)  # no two logits are close
    for top_k in None, 5:
        drawn = model.generate(tokens, 5, temperature=temperature, top_k=top_k, seed=0)
        assert drawn.equal(model.generate(tokens, 5, temperature=0))


@both
def test_tokens_that_the_corpus_does_not_know_are_never_drawn(model_class, config_class):
    model, tokens = small(model_class, config_class), torch.randint(7, (200, 5))
    for options in {}, {"top_k": 10}, {"top_k": 3}, {"temperature": 0}, {"temperature": 1e30}:
        drawn = model.generate(tokens, 3, seed=0, n_vocab=7, **options)[:, 5:]
        assert drawn.max() < 7
        if options == {"temperature": 1e30}:
            assert drawn.unique().tolist() == list(range(7))
    assert model.generate(tokens, 3, seed=0, n_vocab=50).equal(model.generate(tokens, 3, seed=0))


@both
def test_nothing_to_draw_and_nobody_to_draw_for(model_class, config_class):
    model, tokens = small(model_class, config_class), prompt()
    assert model.generate(tokens, 0).equal(tokens)
    for options in {}, {"top_k": 3}, {"temperature": 0}, {"stop": 4}:
        assert model.generate(tokens[:0], 3, seed=0, **options).shape[0] == 0


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision_generate(model_class, config_class, dtype):
    model = small(model_class, config_class).to(dtype)
    assert model.generate(prompt(), 7, top_k=5, seed=0).shape == (3, 12)


def test_logits_that_are_no_numbers_are_named():
    model = small(*MODELS[0])
    for wrong in torch.nan, torch.inf:
        with torch.no_grad():
            model.norm.bias[0] = wrong
        for temperature in 0, 1:
            with pytest.raises(ValueError, match="logits are not finite"):
                model.generate(prompt(), 2, temperature=temperature)


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
        if cl.best_device().type != "cuda":  # there only a look at every batch could tell: CUDA ends the process
            with pytest.raises(ValueError, match=r"tokens must lie in \[0, 50\)"):
                model(torch.tensor([[low, high]]))
        with pytest.raises(ValueError, match=rf"\[0, 50\); got {low} to {high}"):
            model.generate(torch.tensor([[low, high]]), 1)
    for name, values in {
        "n_new": [-1, 2.5, None, "3", True],
        "temperature": [-1, math.nan, math.inf, None, "1"],
        "top_k": [0, -3, 2.0, "3", True],
        "seed": [-1, 2**32, 0.5],
        "stop": [-1, 50, "a"],
        "n_vocab": [0, 51, -1, 2.0],
    }.items():
        for wrong in values:
            with pytest.raises(ValueError, match=rf"{name} must be .*; got {re.escape(repr(wrong))}"):
                model.generate(prompt(), **{"n_new": 1} | {name: wrong})
    with pytest.raises(ValueError, match="stop must be from 0 to 6, a whole number; got 7"):
        model.generate(prompt(), 1, stop=7, n_vocab=7)


@both
def test_a_saved_model_comes_back_the_same(model_class, config_class, tmp_path):
    model, tokens = small(model_class, config_class, expansion=2), prompt()
    model.save(tmp_path / "new" / "folder")
    loaded = cl.load(tmp_path / "new" / "folder").to(tokens.device)
    assert type(loaded) is model_class and loaded.config == model.config and not loaded.training
    assert same_weights(loaded, model)
    assert_close(loaded(tokens), model(tokens))
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


@both
def test_weights_of_a_compiled_or_distributed_model_are_known(model_class, config_class, tmp_path):
    model = small(model_class, config_class)
    for prefix in "_orig_mod.", "module.", "module._orig_mod.":
        wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        model.save(tmp_path, wrapped)
        assert same_weights(cl.load(tmp_path), model)
        other = model_class.with_weights(model.config, renamed(wrapped, str, "memory"), "memory")
        assert same_weights(other, model)


@both
def test_numbers_that_the_disk_lost_are_missed(model_class, config_class, tmp_path):
    small(model_class, config_class).save(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(ValueError, match=r"model\.safetensors .*it is damaged"):
        cl.load(tmp_path)


def test_a_seed_may_be_one_of_numpy():
    model, tokens = small(*MODELS[0]), prompt()
    assert model.generate(tokens, 3, seed=np.uint32(5)).equal(model.generate(tokens, 3, seed=5))


def test_an_interrupted_save_leaves_the_old_model(monkeypatch, tmp_path):
    def interrupted(weights, path, metadata=None):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    model = small(*MODELS[0])
    model.save(tmp_path)
    monkeypatch.setattr("cratelab.storage.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(*MODELS[0], n_layers=1).save(tmp_path)
    assert same_weights(cl.load(tmp_path), model)


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
        (json.dumps(config | {"context": 10**9}), r"model\.safetensors: .*\n.*position_embedding.weight is \(12, 16\)"),
        (json.dumps(config | {"n_layers": 10**8}), r"model\.safetensors: .*\n.*missing blocks.2"),
        (json.dumps(config | {"ista_residual": "false"}), "ista_residual must be true or false; got 'false'"),
        (json.dumps(config | {"lam": math.inf}), "lam must be a finite number"),
        (json.dumps(config | {"width": None}), "width must be an integer; got None"),
        (json.dumps({k: v for k, v in config.items() if k != "width"}), "width"),
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


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        *[("n_layers", value, "must be an integer") for value in (True, 2.0, "2", None, [2], math.nan)],
        *[("vocab_size", value, "must be at least 1") for value in (0, -1, -(10**30))],
        *[("context", value, r"must be at least 1 and below 2\*\*31") for value in (2**31, 10**11, 10**400)],
    ],
)
@both
def test_sizes_are_whole_numbers_that_a_model_may_have(model_class, config_class, name, wrong, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        config_class.preset("toy", **{name: wrong})


@pytest.mark.parametrize(
    "config_class, name, wrong, message",
    [
        *[(cl.CrateConfig, "lam", value, "lam must be a finite number") for value in (math.nan, math.inf, "0.1", None)],
        *[(cl.CrateConfig, "step_size", value, "step_size must be a finite") for value in (math.inf, True, 10**400)],
        (cl.CrateConfig, "step_size", 0, "step_size > 0"),
        (cl.CrateConfig, "lam", -0.1, "lam >= 0"),
        (cl.CrateConfig, "n_steps", 10**8, "n_steps must be at most 1000"),
        *[(cl.CrateConfig, "ista_residual", value, "must be true or false") for value in ("false", 0, None)],
        (cl.Gpt2Config, "bias", "false", "bias must be true or false; got 'false'"),
        (cl.Gpt2Config, "activation", None, "activation must be a text; got None"),
        *[(cl.Gpt2Config, "norm_eps", value, "norm_eps must be a finite number") for value in (math.nan, "1e-5")],
        *[(cl.Gpt2Config, "norm_eps", value, "norm_eps must be positive") for value in (0, -1e-5)],
    ],
)
def test_other_fields_are_of_their_type_and_in_range(config_class, name, wrong, message):
    with pytest.raises(ValueError, match=message):
        config_class.preset("toy", **{name: wrong})


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    config = cl.CrateConfig.preset("toy", width=np.int64(32), lam=np.float32(0.5), step_size=1)
    assert (type(config.width), type(config.lam), type(config.step_size)) == (int, float, float)
    cl.Crate(config).save(tmp_path)
    assert cl.load(tmp_path).config == config


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 10**8},
        {"context": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "width": 64},
        {"width": 2**20, "n_heads": 1},
        {"width": 2**31 - 1, "n_heads": 1},
        {"expansion": 2**31 - 1},
        {"n_layers": 2**31 - 1, "width": 1, "n_heads": 1},
    ],
    ids=str,
)
@both
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(model_class, config_class, changes):
    with pytest.raises(ValueError, match=r"this machine has .* GiB in all|larger than any memory"):
        model_class(config_class.preset("toy", **changes))


@both
def test_parameters_are_counted_exactly_before_they_are_made(model_class, config_class, monkeypatch):
    monkeypatch.setattr("cratelab.language_model.memory", lambda device: 1000)
    monkeypatch.setattr("cratelab.language_model._OBJECTS", 0)
    config = config_class.preset("toy")
    with torch.device("meta"):
        model = model_class(config)  # needs no memory but for its objects
    n = model.count_parameters() - sum(parameter.numel() for parameter in model.norm.parameters())
    with pytest.raises(ValueError, match=f"has {n:,} parameters"):
        model_class(config)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(dtype, tmp_path):
    model = small(*MODELS[0])
    weights = model.state_dict() | {"norm.bias": torch.zeros(16, dtype=dtype)}
    model.save(tmp_path, weights)
    for read in lambda: cl.load(tmp_path), lambda: renamed(weights, str, "here"):
        with pytest.raises(ValueError, match=f"(?s)(model.safetensors|here) holds no.*norm.bias is {dtype}"):
            read()
    for wrong in torch.nan, torch.inf:
        weights["norm.bias"] = torch.tensor([0.0, wrong] * 8)
        model.save(tmp_path, weights)
        for read in lambda: cl.load(tmp_path), lambda: renamed(weights, str, "here"):
            with pytest.raises(ValueError, match=r"norm\.bias holds 8 numbers that are not finite"):
                read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype, tmp_path):
    model = small(*MODELS[0])
    model.save(tmp_path, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    for name, tensor in cl.load(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.cpu().equal(model.state_dict()[name].cpu().to(dtype).float())


def test_loading_draws_from_the_generator_as_building_does(tmp_path):
    small(*MODELS[0]).save(tmp_path)
    torch.manual_seed(3)
    cl.load(tmp_path)
    after = torch.rand(1)
    torch.manual_seed(3)
    cl.Crate(cl.CrateConfig(**SMALL))
    assert torch.rand(1).equal(after)


@both
def test_so_many_layers_that_their_names_fill_the_memory_are_refused_even_as_shapes(model_class, config_class):
    config = config_class.preset("toy", n_layers=10**8)
    for mode in torch.device("meta"), FakeTensorMode():
        with mode, pytest.raises(ValueError, match=r"this machine has .* GiB in all"):
            model_class(config)


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
    assert same_weights(again, model)


def test_a_folder_that_holds_a_model_within_says_where(tmp_path):
    small(*MODELS[0]).save(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"holds no model, since there is no config.json in it: give .*model"):
        cl.load(tmp_path)


def test_settings_of_a_newer_edition_are_named(tmp_path):
    small(*MODELS[0]).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rotary": True}))
    with pytest.raises(ValueError, match=r"config.json has settings that Crate does not know.*: rotary"):
        cl.load(tmp_path)
