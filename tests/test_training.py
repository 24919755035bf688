import json
import math
import os
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.losses import Diverged, document_log_probs, validation_loss
from cratelab.recipe import Recipe
from cratelab.steering import steer
from cratelab.training import train

VOCAB, CONTEXT = 19, 12


def corpus(n: int = 600, seed: int = 0, n_documents: int = 30) -> TokenizedCorpus:
    """Documents of different lengths in which each token nearly decides the next."""
    draw = np.random.default_rng(seed)
    tokens = np.cumsum(1 + (draw.random(n) < 0.1)) % VOCAB
    document = np.sort(draw.integers(n_documents, size=n))
    document = np.unique(document, return_inverse=True)[1]
    return TokenizedCorpus.from_arrays(tokens, document, ["a"] * (document[-1] + 1), VOCAB)


def new_model(model=cl.Crate, seed: int = 0, **overrides) -> cl.LanguageModel:
    torch.manual_seed(seed)
    sizes = dict(n_layers=1, n_heads=2, width=16, vocab_size=VOCAB, context=CONTEXT)
    return model(model.config_class(**sizes | overrides))


def recipe(**overrides) -> Recipe:
    usual = dict(steps=6, batch=4, peak_rate=1e-2, final_rate=1e-3, warmup=2, validate_every=3, checkpoint_every=2)
    usual |= dict(precision="no")
    return Recipe(**usual | overrides)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("model", [cl.Crate, cl.Gpt2])
def test_steps_are_those_of_plain_pytorch(model):
    ours, theirs, r = new_model(model), new_model(model), recipe(clip=0.5, weight_decay=0.3)
    rows = train(ours, corpus(), corpus(seed=1), r)
    decayed = [p for name, p in theirs.named_parameters() if p.ndim == 2]
    other = [p for name, p in theirs.named_parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step, row in enumerate(rows):
        windows = torch.as_tensor(corpus().random_windows(4, CONTEXT + 1, [0, step]))
        log_p = theirs(windows[:, :-1]).log_softmax(-1)
        loss = -log_p.gather(2, windows[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_rate_rises_to_the_peak_and_falls_along_half_a_cosine():
    r = Recipe(steps=110, warmup=10, peak_rate=1.0, final_rate=0.1)
    rates = [r.learning_rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    shape = np.cos(np.pi * np.arange(101) / 100)
    np.testing.assert_allclose((np.array(rates[10:]) - 0.55) / 0.45, shape, atol=1e-12)


def test_the_largest_rate_there_is_gives_no_infinite_one():
    assert recipe(steps=2, peak_rate=1.7e308, final_rate=0, warmup=0).learning_rate(0) == 1.7e308


def test_the_defaults_are_the_papers():
    r = Recipe()
    assert r.batch * 1024 == 524_288 and r.steps == 600_000
    assert (r.peak_rate, r.final_rate, r.weight_decay, r.clip) == (6e-4, 6e-5, 0.1, 1.0)
    assert r.learning_rate(1999) == 6e-4 > r.learning_rate(1998)
    assert Recipe(steps=200).learning_rate(19) == 6e-4  # a short run warms up for a tenth of it


def test_learns_to_the_entropy_of_its_corpus():
    rows = train(new_model(), corpus(), corpus(seed=1), recipe(steps=150, batch=16, validate_every=150))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert entropy - 0.1 < rows[-1]["validation_loss"] < entropy + 0.15
    assert rows[0]["loss"] > 2.5


def test_accumulated_parts_make_the_same_step():
    whole, parts = new_model(), new_model()
    rows = train(whole, corpus(), corpus(seed=1), recipe())
    accumulated = train(parts, corpus(), corpus(seed=1), recipe(accumulate=4))
    for a, b in zip(rows, accumulated, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, atol=1e-5, rtol=1e-4)


def test_validates_on_the_same_windows_when_it_says_so():
    model, held_out = new_model(), corpus(seed=1)
    rows = train(model, corpus(), held_out, recipe(steps=7, validate_every=3, validation_windows=5))
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 7]
    windows = torch.as_tensor(held_out.validation_windows(CONTEXT + 1, 5))
    losses = []
    for window in windows:
        log_p = model(window[None, :-1])[0].log_softmax(-1)
        losses += [-log_p[i, token].item() for i, token in enumerate(window[1:])]
    assert rows[-1]["validation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert validation_loss(model, windows, batch=2) == pytest.approx(np.mean(losses), abs=1e-5)


def test_counts_the_tokens_it_has_read():
    rows = train(new_model(), corpus(), corpus(seed=1), recipe(steps=3))
    assert [row["tokens"] for row in rows] == [48, 96, 144]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["seconds"] > 0 for row in rows)


def stop_after(step, error=KeyboardInterrupt):
    def on_step(row):
        if row["step"] == step:
            raise error

    return on_step


def fails(model, **arguments):
    with pytest.raises((Diverged, KeyboardInterrupt, OSError)):
        train(model, corpus(), corpus(seed=1), **arguments)


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without a compiler: what it traces, it runs as it is."""
    warnings.filterwarnings("ignore", message=".*should not be instantiated")  # torch's own
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


SETTINGS = [dict(precision="no"), dict(precision="bf16"), dict(compile=True), dict(compile=True, precision="bf16")]
ENDS = [None, KeyboardInterrupt(), OSError("full"), Diverged("lost")]


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_the_model_is_afterwards_what_it_was_however_training_ends(settings, end, quick_compile, tmp_path):
    model = new_model().train(False)
    model.blocks[0].train()
    kept, modes = set(model.__dict__), [module.training for module in model.modules()]
    train_it = dict(recipe=recipe(steps=2, checkpoint_every=1, **settings), run_dir=tmp_path / "run")
    if end:
        fails(model, **train_it, on_step=stop_after(1, end))
    else:
        train(model, corpus(), corpus(seed=1), **train_it)
    loaded = cl.load(tmp_path / "run" / ("checkpoint-1" if end else "model"))
    tokens = torch.arange(2 * CONTEXT).reshape(2, CONTEXT) % VOCAB
    torch.testing.assert_close(model(tokens), loaded(tokens), rtol=0, atol=0)
    assert set(model.__dict__) == kept and model.forward.__func__ is cl.Crate.forward
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    with steer(model, layer=0, neuron=0, value=50.0):
        assert (model(tokens) - loaded(tokens)).abs().max() > 0.1


def test_the_same_model_can_be_trained_again_at_another_precision(quick_compile):
    """Once more in bfloat16 is other than once more in float32, and once more in float32 as if it had been new."""
    again = {}
    for precision, compiled in ("no", False), ("bf16", False), ("bf16", True), ("no", True):
        model = new_model()
        train(model, corpus(), corpus(seed=1), recipe(precision="bf16" if compiled else "no", compile=compiled))
        loaded = new_model()
        loaded.load_state_dict(model.state_dict())
        for each in model, loaded:
            train(each, corpus(), corpus(seed=1), recipe(precision=precision, compile=False))
        torch.testing.assert_close(weights(model), weights(loaded), rtol=0, atol=0)
        again[precision, compiled] = weights(model)["norm.weight"]
    assert not again["no", False].equal(again["bf16", False])


def losses_at_each_precision() -> list[float]:
    recipes = recipe(steps=3, precision="no"), recipe(steps=3, precision="bf16")
    return [train(new_model(), corpus(), corpus(seed=1), each)[-1]["loss"] for each in recipes]


def test_precision_is_the_recipes_whatever_accelerator_the_process_has():
    script = f"""
        import sys
        sys.path[:0] = [{os.path.dirname(__file__)!r}]
        import conftest, torch
        from accelerate import Accelerator
        torch.set_num_threads(1)
        mine = Accelerator(mixed_precision="bf16")
        from test_training import losses_at_each_precision
        print(losses_at_each_precision())
        assert mine.mixed_precision == "bf16" and mine.native_amp
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fine, coarse = losses_at_each_precision()
    assert json.loads(done.stdout) == [pytest.approx(fine, abs=1e-6), pytest.approx(coarse, abs=1e-6)]
    assert abs(fine - coarse) > 1e-5


class InFloat16(Accelerator):
    """What `accelerate launch --mixed_precision fp16` gives on a GPU, here on a CPU, from a scale that overflows."""

    mixed_precision = "fp16"

    def __init__(self, **settings):
        super().__init__(**settings)
        self.native_amp, self.scaler = True, torch.amp.GradScaler(self.device.type, init_scale=2.0**40)


def test_float16_skips_what_overflows_and_goes_on_at_the_scale_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr("cratelab.training.Accelerator", InFloat16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = dict(steps=60, precision="auto", checkpoint_every=55)
    whole = new_model()
    rows = train(whole, corpus(), corpus(seed=1), recipe(**settings))
    skipped = [row["step"] for row in rows if row["gradient_norm"] is None]
    assert skipped[:15] == list(range(1, 16)) and len(skipped) < 40
    assert rows[-1]["validation_loss"] < rows[0]["loss"]
    fails(new_model(), recipe=recipe(**settings), run_dir=tmp_path, on_step=stop_after(56))
    resumed = new_model()
    train(resumed, corpus(), corpus(seed=1), recipe(**settings), tmp_path)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_gradients_from_before_do_not_count():
    fresh, used = new_model(), new_model()
    used(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    for model in fresh, used:
        train(model, corpus(), corpus(seed=1), recipe(steps=2))
    torch.testing.assert_close(weights(used), weights(fresh), rtol=0, atol=0)


def test_trains_where_gradients_are_switched_off():
    usual, inside = new_model(), new_model()
    train(usual, corpus(), corpus(seed=1), recipe(steps=2, precision="no"))
    with torch.no_grad():
        train(inside, corpus(), corpus(seed=1), recipe(steps=2, precision="no"))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(weights(inside), weights(usual), rtol=0, atol=0)


def test_the_precision_is_not_also_chosen_around_the_call():
    device = next(new_model().parameters()).device.type
    with (
        torch.autocast(device, torch.bfloat16),
        pytest.raises(ValueError, match=r"within torch.autocast: call it outside"),
    ):
        train(new_model(), corpus(), corpus(seed=1), recipe())


def test_frozen_parameters_stay_frozen_and_as_they_were(tmp_path):
    model = new_model()
    model.token_embedding.weight.requires_grad_(False)
    before = weights(model)["token_embedding.weight"]
    fails(model, recipe=recipe(steps=6), run_dir=tmp_path, on_step=stop_after(3))
    resumed = new_model()
    resumed.token_embedding.weight.requires_grad_(False)
    train(resumed, corpus(), corpus(seed=1), recipe(), tmp_path)
    assert weights(resumed)["token_embedding.weight"].equal(before)
    assert not weights(resumed)["position_embedding.weight"].equal(weights(new_model())["position_embedding.weight"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to train"):
        train(model, corpus(), corpus(seed=1), recipe())


def test_bf16_trains_to_nearly_the_same_loss():
    fine = train(new_model(), corpus(), corpus(seed=1), recipe(steps=10, precision="no"))
    coarse = train(new_model(), corpus(), corpus(seed=1), recipe(steps=10, precision="bf16"))
    assert fine[-1]["loss"] != coarse[-1]["loss"] == pytest.approx(fine[-1]["loss"], abs=0.05)


def test_a_loss_that_is_no_number_stops_and_names_the_checkpoint(tmp_path):
    model = new_model()

    def spoil(row):
        if row["step"] == 4:
            with torch.no_grad():
                model.norm.weight.fill_(math.nan)

    with pytest.raises(Diverged, match=r"step 5: the loss is nan.*checkpoint-4.*lower peak_rate"):
        train(model, corpus(), corpus(seed=1), recipe(), tmp_path / "run", on_step=spoil)
    kept = cl.load(tmp_path / "run" / "checkpoint-4")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.state_dict().values())


def test_a_loss_that_grows_stops():
    with pytest.raises(
        Diverged, match=r"step 2\d: the mean loss of the last 20 steps is .*, the untrained model's was"
    ):
        train(new_model(), corpus(), corpus(seed=1), recipe(steps=300, peak_rate=3.0, weight_decay=0))


def test_document_log_probs_are_those_of_each_document_alone():
    model, text = new_model(context=40), corpus(n=300, n_documents=25)
    got = document_log_probs(model, text, batch=4)
    for i in range(text.n_documents):
        start, stop = text.document_span(i)
        tokens = torch.as_tensor(text.document(i).astype(np.int64))[None]
        assert np.isnan(got[start])
        if stop - start > 1:
            log_p = model(tokens[:, :-1])[0].log_softmax(-1)[torch.arange(stop - start - 1), tokens[0, 1:]]
            np.testing.assert_allclose(got[start + 1 : stop], log_p.detach().cpu(), atol=1e-5)


def test_document_log_probs_end_with_the_context():
    text = TokenizedCorpus.from_arrays(np.arange(30) % VOCAB, np.zeros(30, int), ["a"], VOCAB)
    got = document_log_probs(new_model(), text)
    assert np.isnan(got[0]) and np.isfinite(got[1 : CONTEXT + 1]).all() and np.isnan(got[CONTEXT + 1 :]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(steps=0), "steps must be at least 1; got 0"),
        (dict(batch=-1), "batch must be at least 1; got -1"),
        (dict(peak_rate=math.nan), "peak_rate must be at least 0; got nan"),
        (dict(peak_rate=math.inf), "peak_rate must be at least 0; got inf"),
        (dict(final_rate="1e-4"), "final_rate must be a number; got '1e-4'"),
        (dict(clip=None), "clip must be a number; got None"),
        (dict(weight_decay=True), "weight_decay must be a number; got True"),
        (dict(batch=True), "batch must be a whole number; got True"),
        (dict(steps=1.5), "steps must be a whole number; got 1.5"),
        (dict(steps=math.nan), "steps must be a whole number; got nan"),
        (dict(checkpoint_every="2"), "checkpoint_every must be a whole number; got '2'"),
        (dict(validate_every=None), "validate_every must be a whole number; got None"),
        (dict(seed=-1), "seed must be at least 0; got -1"),
        (dict(seed=2**32), "seed must be from 0 to 4294967295"),
        (dict(compile="yes"), "compile must be True, False or None; got 'yes'"),
        (dict(precision=None), 'precision must be "auto", "no" or "bf16"; got None'),
        (dict(precision="fp8"), 'precision must be "auto", "no" or "bf16"'),
    ],
)
def test_a_recipe_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)


@pytest.mark.parametrize(("n", "batch"), [(0, 16), (2, 0), (2, math.nan)])
def test_a_loss_over_no_window_is_refused(n, batch):
    with pytest.raises(ValueError, match=r"one window or more|batch must be at least 1"):
        validation_loss(new_model(), torch.zeros(n, 5, dtype=torch.long), batch)


def test_numbers_of_numpy_are_numbers_and_the_largest_seed_is_one(tmp_path):
    r = recipe(steps=np.int64(2), peak_rate=np.float32(0.01), seed=np.uint32(2**32 - 1), warmup=None)
    train(new_model(), corpus(), corpus(seed=1), r, tmp_path)
    kept = json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert kept["steps"] == 2 and kept["seed"] == 2**32 - 1 and kept["peak_rate"] == float(np.float32(0.01))


@pytest.mark.parametrize("name", ["Toy", "tiny", "", "s", None, 3])
def test_a_preset_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=r"no preset .*; there are toy, 1L, 2L, 3L, S, B"):
        Recipe.preset(name)
    assert Recipe.preset("S") == Recipe() != Recipe.preset("toy")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=f'weights of {dtype} are too coarse .*precision="bf16"'):
        train(new_model().to(dtype), corpus(), corpus(), recipe())


def test_a_model_that_is_wrapped_is_refused(quick_compile):
    with pytest.raises(ValueError, match="itself and not wrapped; got OptimizedModule"):
        train(torch.compile(new_model()), corpus(), corpus(), recipe())


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"training corpus has 19 tokens, the model knows 7: .*vocab_size=19 or more"):
        train(new_model(vocab_size=7), corpus(), corpus(), recipe(), run)
    with pytest.raises(ValueError, match=r"validation corpus has 12 tokens, fewer than the context and one more"):
        train(new_model(), corpus(), corpus(n=12), recipe(), run)
    with pytest.raises(ValueError, match=r"batch must be a multiple of processes × accumulate; got 4, 1 and 3"):
        train(new_model(), corpus(), corpus(), recipe(accumulate=3), run)
    assert not run.exists()


def test_metrics_are_what_was_returned(tmp_path):
    rows = train(new_model(), corpus(), corpus(seed=1), recipe(), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_trains_within_inference_mode_but_no_model_that_was_made_there():
    model, settings = new_model(), recipe(steps=1)
    before = weights(model)
    with torch.inference_mode():
        train(model, corpus(), corpus(seed=1), settings)
        made_there = new_model()
    assert any(not tensor.cpu().equal(before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"made under torch.inference_mode"):
        train(made_there, corpus(), corpus(seed=1), settings)
