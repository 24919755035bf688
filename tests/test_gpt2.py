import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import cratelab as cl

transformers = pytest.importorskip("transformers")

# The official counts, without position embeddings, for the official padded vocabulary; no biases.
PARAMETERS = {"1L": 6_635_904, "2L": 6_832_768, "3L": 7_029_632, "S": 81_110_784, "B": 123_587_328}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameter_counts_are_the_official_integers(preset):
    with torch.device("meta"):
        model = cl.Gpt2(cl.Gpt2Config.preset(preset))
    assert model.count_parameters(positions=False) == PARAMETERS[preset]


def test_presets_have_relu_and_no_bias_anywhere():
    with torch.device("meta"):
        model = cl.Gpt2(cl.Gpt2Config.preset("3L"))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model.config.activation == "relu" and model.norm.eps == 1e-5


def test_the_start_has_the_official_statistics():
    model = cl.Gpt2(cl.Gpt2Config.preset("2L", width=256, bias=True))
    for weight, std in [
        (model.token_embedding.weight, 0.02),
        (model.position_embedding.weight, 0.02),
        (model.blocks[1].attention.projection.weight, 0.02),
        (model.blocks[1].mlp_in.weight, 0.02),
        (model.blocks[1].attention.output.weight, 0.02 / 4**0.5),
        (model.blocks[1].mlp_out.weight, 0.02 / 4**0.5),
    ]:
        assert abs(float(weight.detach().std()) / std - 1) < 0.03
    assert all((parameter == 0).all() for name, parameter in model.named_parameters() if name.endswith("bias"))


@pytest.fixture(params=["gelu_new", "gelu", "relu"])
def theirs(request):
    config = transformers.GPT2Config(
        n_layer=3,
        n_head=2,
        n_embd=16,
        vocab_size=50,
        n_positions=12,
        n_inner=48,
        activation_function=request.param,
        layer_norm_epsilon=1e-4,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_huggingface_weights_give_their_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, tokens = cl.Gpt2.from_huggingface(tmp_path), torch.randint(50, (2, 12))
    assert_close(ours.to(tokens.device)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert ours.config.activation == theirs.config.activation_function and ours.config.norm_eps == 1e-4


def test_old_files_with_masks_and_without_prefix_load_too(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    tokens = torch.randint(50, (2, 12))
    assert_close(cl.Gpt2.from_huggingface(tmp_path).to(tokens.device)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_a_configuration_of_sizes_alone_means_openais_defaults(tmp_path):
    sizes = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    theirs = transformers.GPT2Config(**sizes)
    transformers.GPT2LMHeadModel(theirs).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    model = cl.Gpt2.from_huggingface(tmp_path)
    ours = model.config.context, model.config.activation, model.config.norm_eps
    assert ours == (theirs.n_positions, theirs.activation_function, theirs.layer_norm_epsilon)
    assert not model.training


def test_unfit_folders_are_refused_by_key(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    for changed, message in [
        ({k: v for k, v in weights.items() if "ln_f.bias" not in k}, r"missing norm.bias \(16,\)"),
        (weights | {"transformer.h.0.mlp.gate": torch.zeros(2)}, "unexpected blocks.0.mlp.gate"),
        (weights | {"transformer.wpe.weight": torch.zeros(5, 16)}, r"\(5, 16\), expected \(12, 16\)"),
        (weights | {"lm_head.weight": torch.zeros(50, 16)}, "lm_head.weight differs"),
        (weights | {"wte.weight": torch.zeros(50, 16)}, "token_embedding.weight twice"),
        (weights | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(16)}, r"mlp_in.weight is \(16,\), expected"),
        (weights | {"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int8)}, "norm.bias is torch.int8"),
    ]:
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            cl.Gpt2.from_huggingface(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    for changed, message in [
        ({"model_type": "bert"}, "'bert'; expected 'gpt2'"),
        ({"activation_function": "silu"}, "'silu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_inner": 50}, "n_inner=50"),
        ({"n_inner": 0}, "n_inner must be a multiple of n_embd, or null; got n_inner=0|expansion must be at least 1"),
        ({"n_inner": "64"}, "got n_inner='64'"),
        ({"n_inner": True}, "got n_inner=True"),
        ({"n_embd": 0}, "width must be at least 1; got 0"),
        ({"n_embd": None}, "width must be an integer; got None"),
        ({"n_layer": 10**8}, r"missing blocks.3.attention_norm.weight"),
        ({"n_positions": None}, "context must be an integer; got None"),
        ({"activation_function": ["relu"]}, "activation must be a text"),
        ({"layer_norm_epsilon": "1e-5"}, "norm_eps must be a finite number"),
        ({"layer_norm_epsilon": 0}, "norm_eps must be positive"),
        ({"layer_norm_epsilon": float("nan")}, "norm_eps must be a finite number"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"scale_attn_weights": 1}, "scale_attn_weights"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            cl.Gpt2.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "n_embd"}))
    with pytest.raises(ValueError, match="lacks n_embd"):
        cl.Gpt2.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        cl.Gpt2.from_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        cl.Gpt2.from_huggingface(tmp_path)


def test_a_limit_keeps_the_strongest_neurons_of_each_token(tmp_path):
    torch.manual_seed(0)
    free = cl.Gpt2(cl.Gpt2Config.preset("toy", vocab_size=64, context=8))
    limited = cl.Gpt2(cl.Gpt2Config.preset("toy", vocab_size=64, context=8, top_k=5))
    limited.load_state_dict(free.state_dict())
    limited.save(tmp_path)
    seen = []
    for model in free, cl.load(tmp_path):
        model.blocks[0].neurons.register_forward_hook(lambda module, inputs, a: seen.append(a.detach()))
        model(torch.arange(16).reshape(2, 8))
    for plain, kept in zip(*(a.flatten(0, 1) for a in seen), strict=True):
        order = sorted(range(256), key=lambda j: -plain[j])
        assert float(plain[order[5]]) > 0, "the limit would do nothing"
        assert_close(kept[order[:5]], plain[order[:5]])
        assert not kept[order[5:]].any()


def test_a_file_with_the_head_alone_gives_the_same_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    weights, tokens = load_file(tmp_path / "model.safetensors"), torch.randint(50, (2, 12))
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    save_file(weights, tmp_path / "model.safetensors")
    ours = cl.Gpt2.from_huggingface(tmp_path).to(tokens.device)
    assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("top_k", [0, 257, True, 2.0, "2"])
def test_an_impossible_limit_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k must be 1 to 256, or None"):
        cl.Gpt2Config.preset("toy", top_k=top_k)
