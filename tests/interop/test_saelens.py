"""SAELens trains on a CRATE, ours or exported, scores as cratelab does, and exchanges auto-encoders with it."""

import pytest
import sae_lens
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from test_transformer_lens import *  # noqa: F403 (SAELens brings TransformerLens 3, which takes the same adapter)
from transformers import AutoModelForCausalLM, AutoTokenizer

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.reading import hooked
from cratelab.sae import Sae, SaeConfig, evaluate_sae

HOOKS = {"own": "blocks.1.neurons", "exported": "model.blocks.1.neurons"}
D_IN, N_TEXTS, CONTEXT = 512, 16, 64


@pytest.fixture(scope="module")
def proxies(crate, exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    return {"own": HookedProxyLM(crate, tokenizer), "exported": HookedProxyLM(theirs, tokenizer)}


@pytest.fixture(scope="module")
def tokens(crate):
    return crate.generate(torch.randint(4096, (N_TEXTS, 1)), CONTEXT - 1, seed=0)


def random_sae(kind="relu", **config) -> Sae:
    sae = Sae(SaeConfig(D_IN, 2, kind, **config))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.1)
        if sae.architecture.has_threshold:
            sae.threshold.uniform_(0, 0.5)
    return sae


def codes(crate, tokens):
    found = []
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: found.append(neurons))), torch.no_grad():
        crate(tokens)
    return found[0].flatten(0, 1)


def same_function(ours, theirs, x):
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=5e-7, rtol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), atol=5e-7, rtol=1e-5)
    assert (ours.encode(x) > 0).any()


def scores(proxy, sae, hook, tokens, folder):
    """What SAELens says of our auto-encoder on these texts."""
    sae.save(folder, hook_name=hook, context_size=CONTEXT, prepend_bos=False, seqpos_slice=[None])
    theirs = sae_lens.SAE.load_from_disk(folder)
    texts = Dataset.from_dict({"tokens": tokens.tolist()})
    kept = dict(disable_concat_sequences=True, streaming=False, store_batch_size_prompts=len(tokens))
    store = ActivationsStore.from_sae(proxy, theirs, texts, n_batches_in_buffer=2, train_batch_size_tokens=64, **kept)
    assert store.get_batch_tokens().equal(tokens)
    store.reset_input_dataset()
    wanted = dict(compute_ce_loss=True, compute_sparsity_metrics=True, compute_variance_metrics=True)
    config = EvalConfig(n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, **wanted)
    groups, _ = run_evals(theirs, store, proxy, ActivationScaler(), config, exclude_special_tokens=False)
    return {name: value for group in groups.values() for name, value in group.items()}


def corpus(tokens):
    documents = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1]).numpy()
    names = [f"text {i}" for i in range(len(tokens))]
    return TokenizedCorpus.from_arrays(tokens.flatten().numpy(), documents, names, 4096)


def test_what_the_page_prints(crate, printed, proxies, tokens):
    names = printed("SAELens")
    x = codes(crate, tokens)
    assert names["ours"].config == SaeConfig(D_IN, 2.0, "topk", k=16)
    same_function(names["ours"], names["theirs"], x)
    same_function(names["ours"], sae_lens.SAE.load_from_disk("theirs"), x)
    torch.manual_seed(1)
    untrained = evaluate_sae(crate, corpus(tokens), {1: Sae(names["ours"].config)})[1].explained_variance
    trained = evaluate_sae(crate, corpus(tokens), {1: names["ours"]})[1]
    assert trained.explained_variance > max(untrained, 0) + 0.2 and trained.l0 <= 16 and trained.recovered > 0.5


def test_it_trains_on_our_own_class(crate, proxies, tokens, tmp_path):
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=1024, l1_coefficient=0.1),
        hook_name=HOOKS["own"],
        context_size=CONTEXT,
        training_tokens=20_000,
        lr=2e-3,
        prepend_bos=False,
        streaming=False,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        output_path=str(tmp_path / "sae"),
        checkpoint_path=None,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    texts = Dataset.from_dict({"tokens": crate.generate(torch.randint(4096, (320, 1)), CONTEXT - 1, seed=1).tolist()})
    sae_lens.LanguageModelSAETrainingRunner(config, override_dataset=texts, override_model=proxies["own"]).run()
    sae = Sae.load(tmp_path / "sae")
    assert sae.config.kind == "relu" and evaluate_sae(crate, corpus(tokens), {1: sae})[1].explained_variance > 0.5
    same_function(sae, sae_lens.SAE.load_from_disk(tmp_path / "sae"), codes(crate, tokens))


@pytest.mark.parametrize("which", ["own", "exported"])
def test_scores_agree(crate, proxies, tokens, tmp_path, which):
    sae, hook, text = random_sae("topk", k=16), HOOKS[which], corpus(tokens)
    ours, theirs = evaluate_sae(crate, text, {1: sae})[1], scores(proxies[which], sae, hook, tokens, tmp_path / "x")
    for name, expected in {
        "explained_variance": ours.explained_variance,
        "l0": ours.l0,
        "ce_loss_without_sae": ours.ce_clean,
        "ce_loss_with_sae": ours.ce_spliced,
        "ce_loss_with_ablation": ours.ce_zero,
    }.items():
        assert theirs[name] == pytest.approx(expected, rel=1e-4), name
    assert ours.ce_zero > ours.ce_clean + 0.1  # a silent code costs


def test_explained_variance_knows_no_scale_and_is_0_for_the_mean(crate, proxies, tokens, tmp_path):
    sae, text = random_sae(), corpus(tokens)
    scaled, mean = Sae(sae.config), Sae(sae.config)
    with torch.no_grad():
        for name, factor in dict(W_enc=0.01, b_enc=1, W_dec=100, b_dec=100).items():
            getattr(scaled, name).copy_(factor * getattr(sae, name))
        mean.W_dec.zero_()
        mean.b_dec.copy_(codes(crate, tokens).mean(0))

    def both(proxy, each, folder):
        theirs = scores(proxy, each, HOOKS["own"], tokens, tmp_path / folder)["explained_variance"]
        return evaluate_sae(crate, text, {1: each})[1].explained_variance, theirs

    plain = both(proxies["own"], sae, "x")
    assert both(proxies["own"], mean, "mean") == pytest.approx((0, 0), abs=1e-5)
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: 100 * neurons)):
        after = HookedProxyLM(crate, proxies["own"].tokenizer)  # its hooks see what those before them give
        hundredfold = both(after, scaled, "100x")
    assert plain[0] == pytest.approx(plain[1], rel=1e-4) and hundredfold == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("which", ["own", "exported"])
def test_zeroing_the_code_moves_the_logits(crate, proxies, tokens, which):
    silenced = proxies[which].run_with_hooks(tokens, fwd_hooks=[(HOOKS[which], lambda code, hook: 0 * code)])
    with hooked((crate.blocks[1].neurons, lambda module, inputs, neurons: torch.zeros_like(neurons))):
        torch.testing.assert_close(silenced, crate(tokens), atol=2e-5, rtol=1e-5)
    assert (silenced - crate(tokens)).abs().max() > 1


@pytest.mark.parametrize(
    "kind, theirs",
    [("relu", "standard"), ("batchtopk", "jumprelu"), ("jumprelu", "jumprelu"), ("topk", "topk")],
)
def test_each_reads_what_the_other_writes(tmp_path, kind, theirs):
    sae, x = random_sae(kind, k=3), torch.randn(50, D_IN) * 0.1
    sae.save(tmp_path / "ours", model_name="toy", hook_name="blocks.0.neurons")
    read = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert read.cfg.architecture() == theirs and read.cfg.metadata.hook_name == "blocks.0.neurons"
    same_function(sae, read, x)
    read.save_model(tmp_path / "theirs")
    again = Sae.load(tmp_path / "theirs")
    assert again.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(
    "kind, settings",
    [("Standard", {}), ("JumpReLU", {}), ("TopK", {"k": 4}), ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": True})],
)
def test_what_is_theirs_alone_is_read(tmp_path, kind, settings, subtracts):
    config = getattr(sae_lens, f"{kind}SAEConfig")(d_in=7, d_sae=11, apply_b_dec_to_input=subtracts, **settings)
    foreign = getattr(sae_lens, f"{kind}SAE")(config)
    with torch.no_grad():
        for parameter in foreign.parameters():
            parameter.normal_(std=0.3)
    foreign.save_model(tmp_path)
    same_function(Sae.load(tmp_path), foreign, torch.randn(50, 7))


def test_a_gated_one_is_refused_by_name(tmp_path):
    sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=7, d_sae=11)).save_model(tmp_path)
    with pytest.raises(ValueError, match="the architecture 'gated'; this reads standard and jumprelu and topk"):
        Sae.load(tmp_path)
