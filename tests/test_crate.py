import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import cratelab as cl

# The official modules' own counts, without position embeddings, for the official padded vocabulary.
PARAMETERS = {"1L": 6_538_112, "2L": 6_637_056, "3L": 6_736_000, "S": 59_891_712, "B": 81_148_416}
ARGS = dict(n_layer=3, n_head=2, n_embd=16, block_size=12, bias=False, vocab_size=50, dropout=0.0)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameter_counts_are_the_official_integers(preset):
    with torch.device("meta"):
        model = cl.Crate(cl.CrateConfig.preset(preset))
    assert model.count_parameters(positions=False) == PARAMETERS[preset]
    assert model.count_parameters() == PARAMETERS[preset] + 1024 * model.config.width


def test_the_start_has_the_official_statistics():
    model = cl.Crate(cl.CrateConfig.preset("3L", width=256))
    for weight, std in [
        (model.token_embedding.weight, 0.02),
        (model.position_embedding.weight, 0.02),
        (model.blocks[1].attention.projection.weight, 0.02),
        (model.blocks[1].attention.output.weight, 0.02 / 6**0.5),
        (model.blocks[1].ista.weight, (2 / 256) ** 0.5),
    ]:
        assert abs(float(weight.detach().std()) / std - 1) < 0.03
        assert abs(float(weight.detach().mean())) < 0.05 * std
    norms = [model.norm, model.blocks[0].attention_norm, model.blocks[2].ista_norm]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() and norm.eps == 1e-5 for norm in norms)
    assert (model.blocks[0].attention.output.bias == 0).all()


def test_neurons_are_codes_by_the_constants_of_the_configuration():
    model = cl.Crate(cl.CrateConfig.preset("toy", expansion=3, step_size=0.3, lam=0.02, n_steps=4))
    block, x, seen = model.blocks[1], torch.randn(2, 7, 64), []
    block.ista_norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    block.neurons.register_forward_hook(lambda *args: seen.append(args[-1]))
    block(x)
    assert seen[1].shape == (2, 7, 192)
    assert_close(seen[1], cl.ista(seen[0], block.ista.D, step_size=0.3, lam=0.02, n_steps=4))


def test_atoms_replace_the_tokens_unless_a_residual_is_asked_for():
    tokens = torch.randint(256, (2, 7))
    for residual in False, True:
        model = cl.Crate(cl.CrateConfig.preset("toy", ista_residual=residual))
        block, x = model.blocks[0], torch.randn(2, 7, 64)
        block.neurons.register_forward_hook(lambda module, args, neurons: 0 * neurons)
        middle = x + block.attention(block.attention_norm(x))
        assert_close(block(x), middle if residual else 0 * x)
        assert model(tokens).shape == (2, 7, 256)


def official_weights(args):
    """Random weights under the official names, in the official shapes."""
    d, v, c = args["n_embd"], args["vocab_size"], args["block_size"]
    shapes = {"transformer.wte.weight": (v, d), "transformer.wpe.weight": (c, d)}
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}."
        shapes |= {h + "prenorm_1.weight": (d,), h + "prenorm_1.bias": (d,)}
        shapes |= {h + "attn.c_attn.weight": (d, d), h + "attn.c_proj.weight": (d, d), h + "attn.c_proj.bias": (d,)}
        shapes |= {h + "prenorm_2.weight": (d,), h + "prenorm_2.bias": (d,), h + "ista.weight": (4 * d, d)}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def official_logits(weights, args, tokens):
    """The official forward pass written out plainly: heads one by one, ISTA by its five products."""
    d, heads = args["n_embd"], args["n_head"]
    p, n = d // heads, tokens.shape[1]

    def norm(x, name):
        return F.layer_norm(x, (d,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:n]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}."
        w = norm(x, h + "prenorm_1") @ weights[h + "attn.c_attn.weight"].T
        outputs = []
        for k in range(heads):
            head = w[..., k * p : (k + 1) * p]
            scores = head @ head.transpose(1, 2) / p**0.5 + torch.full((n, n), -torch.inf).triu(1)
            outputs.append(scores.softmax(-1) @ head)
        x = x + torch.cat(outputs, -1) @ weights[h + "attn.c_proj.weight"].T + weights[h + "attn.c_proj.bias"]
        y, D = norm(x, h + "prenorm_2"), weights[h + "ista.weight"].T
        code = torch.zeros(*y.shape[:2], 4 * d)
        for _ in range(2):
            code = F.relu(code - 0.1 * (code @ (D.T @ D).T - y @ D) - 0.1 * 0.1)
        x = code @ D.T
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_official_checkpoints_give_the_official_logits(prefix, tmp_path):
    """As written, and from a compiled model, a distributed one, or both."""
    weights, tokens = official_weights(ARGS), torch.randint(50, (2, 12))
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({"model": stored, "model_args": ARGS, "iter_num": 7, "optimizer": {}}, tmp_path / "ckpt.pt")
    model = cl.Crate.from_official(tmp_path / "ckpt.pt").to(tokens.device)
    assert not model.training
    assert model.config == cl.CrateConfig(n_layers=3, n_heads=2, width=16, vocab_size=50, context=12)
    assert_close(model(tokens), official_logits(weights, ARGS, tokens), rtol=0, atol=1e-4)


def test_the_tied_embedding_may_be_stored_as_the_head_alone(tmp_path):
    weights, tokens = official_weights(ARGS), torch.randint(50, (2, 12))
    logits = official_logits(weights, ARGS, tokens)
    del weights["transformer.wte.weight"]
    torch.save({"model": weights, "model_args": ARGS}, tmp_path / "ckpt.pt")
    assert_close(cl.Crate.from_official(tmp_path / "ckpt.pt").to(tokens.device)(tokens), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n_layer": 10**8}, "missing blocks.3.ista.weight"),
        ({"block_size": 10**9}, r"position_embedding.weight is \(12, 16\), expected \(1000000000, 16\)"),
        ({"n_embd": 2**31 - 2}, "larger than any memory"),
        ({"n_layer": None}, "n_layers must be an integer; got None"),
        ({"n_head": 0}, "n_heads must be at least 1; got 0"),
        ({"n_embd": "16"}, "width must be an integer; got '16'"),
        ({"vocab_size": 50.0}, "vocab_size must be an integer; got 50.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_odd_sizes_are_named_before_a_model_is_built(changed, message, tmp_path):
    torch.save({"model": official_weights(ARGS), "model_args": ARGS | changed}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=rf"(?s)ckpt\.pt.*{message}"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")


def odd_tensors():
    plain = torch.zeros(64, 16)
    return {
        "integers": (plain.long(), "is torch.int64, expected float16, bfloat16, float32 or float64"),
        "bool": (plain.bool(), "is torch.bool, expected float16, bfloat16, float32 or float64"),
        "complex": (plain.to(torch.complex64), "is torch.complex64, expected float16, bfloat16, float32 or float64"),
        "8 bits": (plain.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, expected float16"),
        "NaN": (plain.masked_fill(torch.arange(16) < 1, torch.nan), "holds 64 numbers that are not finite"),
        "infinite": (torch.full((64, 16), -torch.inf), "holds 1024 numbers that are not finite"),
        "too large for float32": (plain.double() + 1e300, "holds 1024 numbers that are not finite"),
        "sparse": (plain.to_sparse(), "is sparse"),
        "without numbers": (plain.to("meta"), "is .* without its numbers"),
        "expanded": (torch.zeros(1, 1).expand(64, 16), r"is \(64, 16\), more than the file holds"),
        "a number": (3.5, "is float, expected a tensor"),
        "a list": ([1.0], "is list, expected a tensor"),
        "nothing": (None, "is NoneType, expected a tensor"),
    }


@pytest.mark.parametrize("kind", odd_tensors())
def test_what_are_no_weights_is_refused_by_name(kind, tmp_path):
    tensor, message = odd_tensors()[kind]
    weights = official_weights(ARGS) | {"transformer.h.1.ista.weight": tensor}
    torch.save({"model": weights, "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=rf"(?s)ckpt\.pt.*blocks.1.ista.weight {message}"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")


def test_views_of_other_tensors_are_read_as_what_they_show(tmp_path):
    weights, tokens = official_weights(ARGS), torch.randint(50, (2, 12))
    logits = official_logits(weights, ARGS, tokens)
    for name in "transformer.wpe.weight", "transformer.h.1.ista.weight":
        large = torch.full((100, 40), torch.nan)
        large[: len(weights[name]), 3:19] = weights[name]
        weights[name] = large[: len(weights[name]), 3:19]
    torch.save({"model": weights, "model_args": ARGS}, tmp_path / "ckpt.pt")
    assert_close(cl.Crate.from_official(tmp_path / "ckpt.pt").to(tokens.device)(tokens), logits, rtol=0, atol=1e-4)


def test_unfit_checkpoints_are_refused_by_key(tmp_path):
    weights = official_weights(ARGS)
    extra = weights | {"transformer.h.0.extra": torch.zeros(3)}
    for changed, message in [
        ({k: v for k, v in weights.items() if "h.1.ista" not in k}, r"missing blocks.1.ista.weight \(64, 16\)"),
        ({k: v for k, v in weights.items() if "wte" not in k and "lm_head" not in k}, "missing token_embedding"),
        (weights | {7: torch.zeros(3)}, "must be named by a text; got 7"),
        (weights | {"module.transformer.ln_f.bias": torch.zeros(16)}, "norm.bias twice, once as module.transf"),
        (
            weights | {"lm_head.weight": torch.full((50, 16), torch.nan)},
            "lm_head.weight holds 800 numbers that are not",
        ),
        (extra, r"unexpected blocks.0.extra \(3,\)"),
        (weights | {"transformer.wpe.weight": torch.zeros(5, 16)}, r"\(5, 16\), expected \(12, 16\)"),
        (weights | {"lm_head.weight": torch.zeros(50, 16)}, "lm_head.weight differs"),
    ]:
        torch.save({"model": changed, "model_args": ARGS}, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=message):
            cl.Crate.from_official(tmp_path / "ckpt.pt")
    torch.save({"model": weights, "model_args": {"n_layer": 3}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="lacks n_head, n_embd, vocab_size, block_size"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    torch.save(weights, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"expected the dicts model and model_args.*put a bare state dict"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    torch.save({"model": weights, "model_args": None}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="expected the dicts model and model_args"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    torch.save(weights["lm_head.weight"], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="dict of tensors; got Tensor"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    with pytest.raises(FileNotFoundError):
        cl.Crate.from_official(tmp_path / "none.pt")


class Harmful:
    def __reduce__(self):
        return print, ("code from a file was run",)


def test_nothing_is_ever_unpickled(tmp_path, capsys):
    torch.save({"model": Harmful(), "model_args": ARGS}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="nothing else is ever unpickled"):
        cl.Crate.from_official(tmp_path / "ckpt.pt")
    assert "code from a file" not in capsys.readouterr().out
