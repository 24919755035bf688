"""A CRATE or a GPT-2 in Hugging Face `transformers`: the same function, however it is called."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import cratelab as cl
from cratelab.experiments.reference_models import load_reference, load_reference_tokenizer
from cratelab.storage import locked

TOKENS = torch.tensor([[544, 436, 1060, 290, 7, 3, 1200, 17, 2, 4000], [32, 610, 5, 5, 5, 81, 999, 300, 12, 8]])
PROMPTS = "The function returns", "A list of", "import"


@pytest.fixture(scope="module")
def ours() -> cl.Crate:
    return load_reference("crate", "2L")


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "my-crate.v1"
    cl.to_huggingface(ours, folder, load_reference_tokenizer())
    return folder


def load(folder, kind=AutoModelForCausalLM, **settings):
    return kind.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture
def theirs(exported):
    return load(exported)


@pytest.fixture(scope="module")
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


def greedy(model, tokens, n=20, **settings):
    return model.generate(tokens, max_new_tokens=n, do_sample=False, eos_token_id=None, **settings)


def small(**settings) -> cl.Crate:
    torch.manual_seed(0)
    return cl.Crate(cl.CrateConfig.preset("toy", **settings)).eval()


WITHOUT_CRATELAB = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cratelab":
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Refuse())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

each = [auto.from_pretrained(sys.argv[1], trust_remote_code=True) for auto in
        (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer)]
assert "cratelab" not in sys.modules
config, base, model, tokenizer = each
prompt = tokenizer("The function returns", return_tensors="pt")
print(config.width, base(**prompt).last_hidden_state.shape[-1], type(model).__name__)
print(*model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def without_cratelab(folder, home):
    run = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_CRATELAB, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert not run.returncode, run.stderr
    return run.stdout.splitlines()


def test_the_receiver_needs_no_cratelab(ours, exported, tmp_path):
    prompt = load_reference_tokenizer().encode_ordinary("The function returns")
    expected = ours.generate(torch.tensor([prompt]), 8, temperature=0)[0].tolist()
    assert without_cratelab(exported, tmp_path) == ["128 128 CrateForCausalLM", " ".join(map(str, expected))]


TOKENIZER = """
import sys
import transformers

how = {how}
print(how.from_pretrained(sys.argv[1]{more})("The function returns").input_ids)
assert not any(name.startswith("transformers_modules") for name in sys.modules), "code of the folder was run"
"""


@pytest.mark.parametrize(
    ("how", "more", "asks"),
    [
        ("transformers.PreTrainedTokenizerFast", "", False),
        ("transformers.AutoTokenizer", ", trust_remote_code=False", False),
        ("transformers.AutoTokenizer", "", True),  # it reads the model's configuration, and goes on without its code
    ],
)
def test_the_tokenizer_needs_no_code_of_the_folder(how, more, asks, exported, tmp_path):
    run = subprocess.run(
        [sys.executable, "-I", "-c", TOKENIZER.format(how=how, more=more), str(exported)],
        stdin=subprocess.DEVNULL,  # nobody answers
        capture_output=True,
        text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert not run.returncode, run.stderr
    assert run.stdout.endswith(f"{load_reference_tokenizer().encode_ordinary('The function returns')}\n")
    assert ("[y/N]" in run.stdout) == asks


def test_what_the_receiver_saves_is_complete_too(exported, tmp_path):
    """`transformers` notes the class that it saves; the others must not be lost."""
    for kind in AutoModelForCausalLM, AutoModel:
        again = tmp_path / kind.__name__
        load(exported, kind).save_pretrained(again)
        assert type(load(again)).__name__ == "CrateForCausalLM"
        assert type(load(again, AutoModel)).__name__ == "CrateModel"
        assert AutoConfig.from_pretrained(again, trust_remote_code=True).width == 128


def test_the_configuration_is_ours(exported):
    from cratelab.huggingface.modeling_crate import CrateConfig

    theirs = CrateConfig()
    for field in fields(cl.CrateConfig):
        if field.name not in ("n_layers", "n_heads", "width"):  # ours has no default
            assert getattr(theirs, field.name) == field.default
    read = load(exported, AutoConfig)
    assert (read.hidden_size, read.num_hidden_layers, read.num_attention_heads) == (128, 2, 4)
    assert read.max_position_embeddings == 256


def test_the_folder_holds_the_code_that_the_model_needs_and_no_more(exported):
    """Every import is of the folder, or of what a receiver of models has."""
    code = {file.stem: file.read_text(encoding="utf8") for file in exported.glob("*.py")}
    imported = {
        name.split(".")[0] for source in code.values() for name in re.findall(r"^(?:from|import) (\w+)", source, re.M)
    }
    assert imported - set(sys.stdlib_module_names) == {"einops", "torch", "transformers"}
    beside = {name for source in code.values() for name in re.findall(r"^from \.(\w+) import", source, re.M)}
    assert beside | {"modeling_crate"} == code.keys() and len(code) < 10


def test_logits_are_ours(ours, theirs):
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS))


def test_one_line_of_logits(theirs):
    torch.testing.assert_close(theirs(TOKENS, logits_to_keep=1).logits, theirs(TOKENS).logits[:, -1:])


def test_the_loss_is_nats_a_token(ours, theirs):
    expected = F.cross_entropy(ours(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(theirs(TOKENS, labels=TOKENS).loss, expected)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_generation_is_ours(ours, theirs, settings):
    assert torch.equal(
        greedy(theirs, TOKENS, disable_compile=True, **settings), ours.generate(TOKENS, 20, temperature=0)
    )


def test_generation_stops_at_the_end_of_text(theirs):
    ended = torch.tensor([[4095]])
    with torch.no_grad():
        theirs.model.norm.weight.zero_()
        theirs.model.norm.bias.copy_(theirs.model.token_embedding.weight[4095])  # the most likely everywhere
        theirs.model.token_embedding.weight[4095] *= 10
    assert (
        theirs.generate(TOKENS[:1], max_new_tokens=5, do_sample=False).tolist()
        == torch.cat([TOKENS[:1], ended], 1).tolist()
    )


def test_beam_search_is_that_of_the_definition(ours, theirs):
    prompt = TOKENS[:1, :7]
    beams = [(0.0, prompt)]
    for _ in range(5):
        longer = []
        for score, tokens in beams:
            logp = ours(tokens)[0, -1].log_softmax(-1)
            longer += [(score + logp[i].item(), torch.cat([tokens, i.view(1, 1)], 1)) for i in logp.topk(4).indices]
        beams = sorted(longer, key=lambda beam: -beam[0])[:4]
    found = greedy(theirs, prompt, 5, num_beams=4)
    assert torch.equal(found, beams[0][1]) and not torch.equal(found, greedy(theirs, prompt, 5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(ours, theirs, tokenizer, attention):
    theirs.set_attn_implementation(attention)
    batch = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    assert (batch.attention_mask[:, 0] == 0).any()
    logits = theirs(**batch).logits
    generated = theirs.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(PROMPTS):
        alone = torch.tensor([load_reference_tokenizer().encode_ordinary(prompt)])
        torch.testing.assert_close(logits[row, -alone.shape[1] :], ours(alone)[0], rtol=1e-4, atol=1e-4)
        expected = ours.generate(alone, 12, temperature=0)[0]
        assert torch.equal(generated[row, -len(expected) :], expected)


def test_padding_on_the_right_changes_nothing(ours, theirs, tokenizer):
    batch = tokenizer(list(PROMPTS), padding=True, padding_side="right", return_tensors="pt")
    assert (batch.attention_mask[:, -1] == 0).any()
    logits = theirs(**batch).logits
    for row, n in enumerate(batch.attention_mask.sum(1).tolist()):
        expected = ours(batch.input_ids[row : row + 1, :n])[0]
        torch.testing.assert_close(logits[row, :n], expected, rtol=1e-4, atol=1e-4)


def test_the_cache_holds_one_tensor_a_layer(theirs):
    layers = theirs(TOKENS).past_key_values.layers
    assert [layer.keys.shape for layer in layers] == [(2, 4, 10, 32)] * 2
    assert [layer.values.shape for layer in layers] == [(2, 4, 10, 0)] * 2


def test_a_prompt_in_two_chunks(ours, theirs):
    first = theirs(TOKENS[:, :6], use_cache=True)
    second = theirs(TOKENS[:, 6:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(logits, ours(TOKENS), rtol=1e-4, atol=1e-4)


def test_attention_maps_and_hidden_states(ours, exported):
    theirs = load(exported, attn_implementation="eager")
    inputs, outputs = [], []
    handles = [
        block.attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in ours.blocks
    ]
    handles += [block.register_forward_hook(lambda _, given, output: outputs.append(output)) for block in ours.blocks]
    logits = ours(TOKENS)
    for handle in handles:
        handle.remove()
    found = theirs(TOKENS, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, logits)
    assert len(found.attentions) == 2 and len(found.hidden_states) == 3
    for z, block, weights in zip(inputs, ours.blocks, found.attentions, strict=True):
        torch.testing.assert_close(weights, cl.attention_map(z, block.attention.U, causal=True))
    torch.testing.assert_close(found.hidden_states[1], outputs[0])
    torch.testing.assert_close(found.hidden_states[2], ours.norm(outputs[1]))


def test_embeddings_in_place_of_tokens(ours, theirs):
    embedded = theirs.get_input_embeddings()(TOKENS)
    torch.testing.assert_close(theirs(inputs_embeds=embedded).logits, ours(TOKENS))
    generated = theirs.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, ours.generate(TOKENS, 5, temperature=0)[:, 10:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ours, exported, dtype):
    halves = load(exported, dtype=dtype)
    assert {parameter.dtype for parameter in halves.parameters()} == {dtype}
    error = (halves(TOKENS).logits.float() - ours(TOKENS)).abs().max()
    assert error < 20 * torch.finfo(dtype).eps * ours(TOKENS).abs().max()
    assert greedy(halves, TOKENS, 5).shape == (2, 15)


def test_a_pipeline_in_batches(theirs, tokenizer):
    generate = pipeline("text-generation", theirs, tokenizer=tokenizer, device="cpu")
    settings = dict(do_sample=False, max_new_tokens=6)
    together = generate(list(PROMPTS), batch_size=3, **settings)
    assert [said for (said,) in together] == [generate(prompt, **settings)[0] for prompt in PROMPTS]
    assert together[0][0]["generated_text"].startswith(PROMPTS[0])


def test_gradient_checkpointing_gives_the_same_gradients(theirs):
    def gradients():
        theirs.zero_grad()
        theirs(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in theirs.parameters()]

    theirs.train()
    plain, calls = gradients(), []
    theirs.model.blocks[0].neurons.register_forward_hook(lambda *_: calls.append(1))
    theirs.activation_checkpointing_enable()
    for expected, found in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(calls) == 2  # the second time on the way back


def test_the_vocabulary_grows(ours, theirs, tmp_path):
    theirs.resize_token_embeddings(4160)
    assert theirs.lm_head.weight is theirs.model.token_embedding.weight and theirs.config.vocab_size == 4160
    logits = theirs(TOKENS).logits
    assert logits.shape == (2, 10, 4160)
    torch.testing.assert_close(logits[..., :4096], ours(TOKENS))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(cl.load(tmp_path)(TOKENS), logits)


def test_the_tied_head_is_not_stored(exported):
    assert "lm_head.weight" not in load_file(exported / "model.safetensors")


def test_weights_start_as_ours(exported, tmp_path):
    ours = small(n_layers=8, vocab_size=512)
    cl.to_huggingface(ours, tmp_path / "small")
    config = load(tmp_path / "small", AutoConfig)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    fresh = dict(theirs.model.named_parameters())
    assert fresh.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        assert fresh[name].std().item() == pytest.approx(weight.std().item(), rel=0.1), name
        assert fresh[name].mean().item() == pytest.approx(weight.mean().item(), abs=0.01), name
        assert weight.std() == 0 or not torch.equal(fresh[name], weight), name
        assert fresh[name].abs().max().item() == pytest.approx(weight.abs().max().item(), rel=0.5), name


def test_past_the_context_there_is_a_clear_error(theirs):
    long = torch.zeros(1, 257, dtype=torch.int64)
    with pytest.raises(ValueError, match="the context is 256 tokens, since positions are learned; got 257"):
        theirs(long)
    with pytest.raises(ValueError, match="the context is 256 tokens"):
        greedy(theirs, long[:, :250], 8)


def test_second_derivatives_by_the_eager_path(exported):
    theirs = load(exported, attn_implementation="eager", dtype=torch.float64)
    e = theirs.get_input_embeddings()(TOKENS[:1]).detach()
    direction = torch.randn(e.shape, dtype=e.dtype, generator=torch.Generator().manual_seed(0)) * e.std()

    def loss(embedded):
        logits = theirs(inputs_embeds=embedded, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1], TOKENS[0, 1:])  # in double precision, where theirs is in single

    def slope(embedded, create_graph=False):
        return torch.autograd.grad(loss(embedded), embedded, create_graph=create_graph)[0]

    step = 1e-5
    ends = (slope((e + sign * step * direction).requires_grad_()).square().sum() for sign in (1, -1))
    expected = (next(ends) - next(ends)) / (2 * step)
    at = e.clone().requires_grad_()
    (twice,) = torch.autograd.grad(slope(at, create_graph=True).square().sum(), at)
    torch.testing.assert_close((twice * direction).sum(), expected, rtol=1e-4, atol=0)
    through_func = torch.func.grad(lambda embedded: torch.func.grad(loss)(embedded).square().sum())(e)
    torch.testing.assert_close(through_func, twice)


def test_trainer_trains(exported, tmp_path):
    theirs = load(exported)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(theirs, arguments, train_dataset=rows)
    before = load(exported)(TOKENS, labels=TOKENS).loss.item()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(before, abs=1e-3) and losses[1] < losses[0]
    trainer.save_model(tmp_path / "tuned")
    theirs.eval()
    torch.testing.assert_close(cl.load(tmp_path / "tuned")(TOKENS), theirs(TOKENS).logits)
    torch.testing.assert_close(load(tmp_path / "tuned")(TOKENS).logits, theirs(TOKENS).logits)


def test_fsdp_wraps_it_block_by_block(theirs):
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(theirs)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(theirs.model.blocks[0])}


def test_hooks_on_neurons_see_our_codes_and_edit_them(ours, theirs):
    codes = {}
    for name, model in ("ours", ours), ("theirs", theirs):
        site = model.get_submodule("blocks.1.neurons" if model is ours else "model.blocks.1.neurons")
        with torch.no_grad():
            handle = site.register_forward_hook(lambda _, given, output, name=name: codes.update({name: output}))
            model(TOKENS)
            handle.remove()
    torch.testing.assert_close(codes["theirs"], codes["ours"])
    assert codes["ours"].shape == (2, 10, 512)
    plain = theirs(TOKENS).logits
    theirs.model.blocks[1].neurons.register_forward_hook(lambda _, given, output: torch.zeros_like(output))
    assert not torch.allclose(theirs(TOKENS).logits, plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_keeps_its_hooks(theirs):
    plain = theirs(TOKENS, use_cache=False).logits
    seen = []

    def silence(module, given, output):
        seen.append(output.detach())
        return torch.zeros_like(output)

    handle = theirs.model.blocks[1].neurons.register_forward_hook(silence)
    edited = theirs(TOKENS, use_cache=False).logits
    compiled = torch.compile(theirs, backend="eager")(TOKENS, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(compiled, edited)
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(edited, plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{"span": 0}, {"span": 2}, {"ista_residual": True, "lam": 0.3, "n_steps": 3}])
def test_other_settings(tmp_path, settings, attention):
    ours = small(**settings)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(3)  # so that what came before makes a difference
    cl.to_huggingface(ours, tmp_path / "crate")
    theirs = load(tmp_path / "crate", attn_implementation=attention)
    tokens = TOKENS % 256
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(theirs, tokens), ours.generate(tokens, 20, temperature=0))
    again = cl.load(tmp_path / "crate")
    assert again.config == ours.config
    padded = F.pad(tokens, (3, 0))
    left = theirs(padded, attention_mask=F.pad(torch.ones_like(tokens), (3, 0))).logits[:, 3:]
    torch.testing.assert_close(left, ours(tokens), rtol=1e-4, atol=1e-4)


def test_load_reads_the_same_weights(ours, exported, tmp_path):
    again = cl.load(exported)
    assert type(again) is cl.Crate and again.config == ours.config and not again.training
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in ours.state_dict().items())


def test_load_reads_what_others_stored_with_its_head_and_names_what_does_not_fit(ours, exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    weights = load_file(exported / "model.safetensors")
    head = weights["model.token_embedding.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    torch.testing.assert_close(cl.load(folder)(TOKENS), ours(TOKENS))
    save_file(weights | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="differs from the token embedding"):
        cl.load(folder)
    (folder / "config.json").write_text((exported / "config.json").read_text().replace('"n_heads": 4', '"n_heads": 3'))
    with pytest.raises(ValueError, match="does not fit Crate: the width must be a multiple of the heads"):
        cl.load(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="of type 'llama'; expected 'crate'"):
        cl.Crate.from_huggingface(folder)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])
@pytest.mark.parametrize("bias", [False, True])
def test_gpt2_becomes_theirs(tmp_path, activation, bias):
    torch.manual_seed(0)
    ours = cl.Gpt2(cl.Gpt2Config.preset("toy", activation=activation, bias=bias, expansion=3)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    cl.to_huggingface(ours, tmp_path / "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert type(theirs) is GPT2LMHeadModel and not list((tmp_path / "gpt2").glob("*.py"))
    tokens = TOKENS % 256
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.train()(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)  # no dropout
    theirs.eval().save_pretrained(tmp_path / "again")
    for folder in "gpt2", "again":
        again = cl.load(tmp_path / folder)
        assert again.config == ours.config and again.state_dict().keys() == ours.state_dict().keys()
        assert all(torch.equal(again.state_dict()[name], weight) for name, weight in ours.state_dict().items())


def test_biases_that_transformers_has_trained_are_read(tmp_path):
    cl.to_huggingface(load_reference("gpt2", "toy"), tmp_path / "gpt2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    torch.nn.init.normal_(theirs.transformer.h[1].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path / "tuned")
    again = cl.load(tmp_path / "tuned")
    assert again.config.bias
    torch.testing.assert_close(again(TOKENS % 256), theirs(TOKENS % 256).logits, rtol=1e-4, atol=1e-4)


def test_the_precision_is_kept(ours, tmp_path):
    cl.to_huggingface(copy.deepcopy(ours).half(), tmp_path / "halves")
    assert {tensor.dtype for tensor in load_file(tmp_path / "halves/model.safetensors").values()} == {torch.float16}
    assert load(tmp_path / "halves").dtype == torch.float16


def test_random_numbers_go_on_as_if_nothing_was_exported(tmp_path):
    model = small()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cl.to_huggingface(model, tmp_path / "crate")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("settings", [{"span": 4}, {"top_k": 8}])
def test_a_gpt2_that_theirs_cannot_be_is_refused(tmp_path, settings):
    model = cl.Gpt2(cl.Gpt2Config.preset("toy", **settings))
    with pytest.raises(
        ValueError, match=f"neither span nor top_k; got .*{next(iter(settings))}={next(iter(settings.values()))}"
    ):
        cl.to_huggingface(model, tmp_path / "gpt2")
    assert not (tmp_path / "gpt2").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(ours, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ValueError, match="not an empty folder: choose another"):
        cl.to_huggingface(ours, tmp_path)
    with pytest.raises(ValueError, match="not an empty folder: choose another"):
        cl.to_huggingface(ours, tmp_path / "kept")
    with pytest.raises(TypeError, match="only Crate and Gpt2 have a form in transformers; got Other"):
        cl.to_huggingface(Other(), tmp_path / "new")

    class Double(cl.Crate):
        def forward(self, *arguments, **options):
            return 2 * super().forward(*arguments, **options)

    with pytest.raises(TypeError, match="only Crate and Gpt2 have a form in transformers; got Double"):
        cl.to_huggingface(Double(ours.config), tmp_path / "new")
    with pytest.raises(TypeError, match="no tokenizer that can be exported: str"):
        cl.to_huggingface(ours, tmp_path / "new", "gpt2")
    spoiled = small()
    spoiled.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"norm\.weight holds 1 numbers that are not finite"):
        cl.to_huggingface(spoiled, tmp_path / "new")
    with pytest.raises(ValueError, match="the tokenizer has token 4095, and the model knows 256 tokens"):
        cl.to_huggingface(small(), tmp_path / "new", load_reference_tokenizer())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'cratelab\[transformers\]'"):
        cl.to_huggingface(ours, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


class Other(cl.LanguageModel):
    def __init__(self):
        torch.nn.Module.__init__(self)


def test_a_full_disk_leaves_nothing_behind(ours, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("cratelab.huggingface.export.write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        cl.to_huggingface(ours, tmp_path / "new")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
import cratelab as cl, cratelab.huggingface.export as export

export.write_text = lambda *_: os._exit(9)  # when the weights are written, and not all
cl.to_huggingface(cl.Crate(cl.CrateConfig.preset("toy")), sys.argv[1])
"""


def test_the_next_export_removes_what_a_killed_one_has_left_and_nothing_else(tmp_path):
    folder, kept = tmp_path / "mine [1]", tmp_path / "mine 1.77-0123abcd.part"
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)]).returncode == 9
    (left,) = tmp_path.glob("mine*.part")
    assert (left / "model.safetensors").is_file() and not folder.exists()
    kept.write_text("of another")
    cl.to_huggingface(small(), folder)
    assert set(tmp_path.iterdir()) == {folder, kept}


def test_of_two_exports_to_one_place_one_is_told_of_the_other(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    with (
        locked(tmp_path / ".new.cratelab-export"),
        pytest.raises(BlockingIOError, match=f"another process is exporting to {folder}: wait until it has ended"),
    ):
        cl.to_huggingface(small(), folder)
    assert not folder.exists()
    ended = []

    def end_first(*_):
        if not ended:  # another export, which ends between the first look at the folder and the lock
            ended.append(True)
            cl.to_huggingface(small(), folder)

    monkeypatch.setattr("cratelab.huggingface.export.check_numbers", end_first)
    with pytest.raises(ValueError, match="new is not an empty folder: choose another"):
        cl.to_huggingface(small(), folder)
    assert list(tmp_path.iterdir()) == [folder] and load(folder).config.width == small().config.width


def test_an_empty_folder_is_filled(tmp_path):
    cl.to_huggingface(small(), tmp_path / "deep/er")
    (tmp_path / "empty").mkdir()
    cl.to_huggingface(small(), tmp_path / "empty")
    assert {file.name for file in (tmp_path / "empty").iterdir()} == {
        file.name for file in (tmp_path / "deep/er").iterdir()
    }


def test_ids_that_no_text_becomes_are_not_generated(tmp_path):
    model = small(vocab_size=320)  # 63 more than the 257 tokens of bytes
    with torch.no_grad():
        model.token_embedding.weight[300] = 5 * model.norm.bias.add_(1)  # the likeliest of all
    cl.to_huggingface(model, tmp_path / "crate", cl.corpora.tokenizers.byte_encoding())
    theirs = load(tmp_path / "crate")
    tokens = TOKENS % 256
    assert (theirs(tokens).logits[:, -1].argmax(-1) == 300).all()
    for settings in {"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}:
        generated = theirs.generate(tokens, max_new_tokens=10, **settings)
        assert generated.max() < 257
    expected = model.generate(tokens, 10, temperature=0, n_vocab=257, stop=256)
    assert torch.equal(theirs.generate(tokens, max_new_tokens=10, do_sample=False), expected)


def test_tokens_may_have_gaps(tmp_path):
    ranks, end = {bytes([value]): value for value in range(256)}, {"<|endoftext|>": 270}
    tokenizer = tiktoken.Encoding("gaps", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=end)
    cl.to_huggingface(small(vocab_size=272), tmp_path / "gaps", tokenizer)
    assert load(tmp_path / "gaps").generation_config.suppress_tokens == [*range(256, 270), 271]
    with pytest.raises(ValueError, match="the tokenizer has token 270, and the model knows 260 tokens"):
        cl.to_huggingface(small(vocab_size=260), tmp_path / "small", tokenizer)


def test_where_an_export_may_go(tmp_path, monkeypatch):
    model, here = small(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ".", "new/..":
        with pytest.raises(ValueError, match="is the current folder, which cannot be replaced: choose another"):
            cl.to_huggingface(model, name)
    (here / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):  # to nothing yet, to an empty folder
        cl.to_huggingface(model, "link")
        assert load(tmp_path / "disk").config.width == model.config.width
        shutil.rmtree(tmp_path / "disk")
        (tmp_path / "disk").mkdir()


def test_weights_in_several_files_are_read_as_if_they_were_in_one(ours, exported, tmp_path):
    load(exported).save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    again = cl.load(tmp_path).state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in ours.state_dict().items())
    gpt2 = cl.Gpt2(cl.Gpt2Config.preset("toy"))
    cl.to_huggingface(gpt2, tmp_path / "gpt2")
    GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    tokens = TOKENS % gpt2.config.vocab_size
    torch.testing.assert_close(cl.load(tmp_path / "parts")(tokens), gpt2.eval()(tokens))


def test_an_index_that_does_not_fit_its_files_is_named(exported, tmp_path):
    load(exported).save_pretrained(tmp_path, max_shard_size="500KB")
    index = tmp_path / "model.safetensors.index.json"
    place = json.loads(index.read_text())["weight_map"]
    name, *others = place
    elsewhere = next(part for part in place.values() if part != place[name])
    beside = str(shutil.copy(tmp_path / place[name], tmp_path.parent))
    for changed, message in (
        ({other: place[other] for other in others}, f"differ in {name}: copy"),
        (place | {name: elsewhere}, f"differ in {name}: copy"),
        (place | {"more": elsewhere}, "differ in more: copy"),
        (place | {name: f"../{place[name]}"}, "in which file beside it that is"),
        (place | {name: beside}, "in which file beside it that is"),
        (place | {name: 3}, "in which file beside it that is"),
        (None, "in which file beside it that is"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message) as found:
            cl.load(tmp_path)
        assert str(index) in str(found.value)
    index.write_text(json.dumps({"weight_map": place}))
    (tmp_path / elsewhere).unlink()
    with pytest.raises(OSError, match=elsewhere):
        cl.load(tmp_path)


def test_other_models_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="names the model 'llama'; known are"):
        cl.load(tmp_path)
