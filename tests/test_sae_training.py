import gc
import json
import shutil
from itertools import count, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from test_sae import WIDTH, talkative
from test_training import corpus

import cratelab as cl
from cratelab import storage
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.losses import Diverged
from cratelab.sae import Sae, SaeConfig, SaeRecipe, architectures, evaluate_sae, train_saes, trainer
from cratelab.sae.activations import ActivationBlocks
from cratelab.sae.learner import Learner

KINDS = dict(relu=dict(l1=0.02), batchtopk=dict(k=3))


def config(kind: str = "relu", d_in: int = WIDTH, expansion: float = 2) -> SaeConfig:
    return SaeConfig(d_in, expansion, kind, **KINDS[kind])


def recipe(**overrides) -> SaeRecipe:
    usual = dict(max_tokens=3000, batch=64, buffer=400, evaluations=5, validation_tokens=150, least_gain=-1e9)
    return SaeRecipe(**usual | overrides)


def learner(kind: str = "relu", d_in: int = 16, expansion: float = 2, rate: float = 1e-2) -> Learner:
    return Learner(Sae(config(kind, d_in, expansion)), rate)


def tensors(sae: Sae) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


# One step


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_is_that_of_a_loop_over_tokens(kind):
    each, x = learner(kind), torch.relu(torch.randn(20, 16))
    x[3] = 0
    x[4] = x[4] / 1000
    p = {name: tensor.double().cpu().numpy() for name, tensor in tensors(each.sae).items()}
    inputs = x.double().cpu().numpy()
    codes = np.maximum(0, (inputs - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    if kind == "batchtopk":
        order = sorted((-codes[i, j], i, j) for i in range(20) for j in range(32))
        for _, i, j in order[60:]:
            codes[i, j] = 0
    sizes = [float((row**2).sum()) for row in inputs]
    expected = 0.0
    for row, code, size in zip(inputs, codes, sizes, strict=True):
        back = code @ p["W_dec"] + p["b_dec"]
        expected += ((back - row) ** 2).sum() / max(size, np.mean(sizes) / 100) / 20
        expected += 0.02 * np.abs(code).sum() / 20 * (kind == "relu")
    loss, code = each.loss(x)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(code.detach().cpu().numpy(), codes, atol=1e-5)
    assert kind == "relu" or int((code > 0).sum()) == 60


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_goes_down_the_gradient_of_normalised_rows(kind):
    """Along unit rows the gradient in w / ‖w‖ is the gradient in w without its part along w, and so is a free check."""
    each, x = learner(kind), torch.relu(torch.randn(30, 16))
    before = tensors(each.sae)
    free = torch.nn.Parameter(before["W_dec"].clone())
    code = each.loss(x)[1].detach()
    errors = (code @ F.normalize(free, dim=1) + before["b_dec"] - x).square().sum(1) / x.square().sum(1)
    errors.mean().backward()
    optimizer = torch.optim.Adam([free], lr=1e-2)
    optimizer.step()
    each.step(x)
    moved = F.normalize(free.detach(), dim=1)
    still = free.grad.abs().amax(1) < 1e-6  # Adam turns rounding into a full step
    torch.testing.assert_close(each.sae.W_dec.detach()[~still], moved[~still], atol=2e-4, rtol=0)
    assert (moved - before["W_dec"]).abs().max() > 5e-3
    torch.testing.assert_close(each.sae.W_dec.detach().norm(dim=1), torch.ones(32))


def test_the_gradient_is_that_of_finite_differences():
    each, x = learner("relu", 5, 1.6), torch.relu(torch.randn(6, 5, dtype=torch.float64))
    each.sae.double()
    loss = each.loss(x)[0]
    loss.backward()
    for name, parameter in each.sae.named_parameters():
        flat, found = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), 3):
            values = []
            for step in 1e-6, -2e-6:
                flat[i] += step
                values.append(each.loss(x)[0].item())
            flat[i] += 1e-6
            assert found[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6), name


def test_silence_is_counted_in_tokens_and_ends_with_activity():
    each = learner()
    with torch.no_grad():
        each.sae.b_enc[5] = -1e9
        each.sae.b_enc[6] = 1e3
    for n in 10, 7:
        each.step(torch.rand(n, 16))
    assert each.idle[5] == 17 and each.idle[6] == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_dead_features_are_born_again_where_reconstruction_is_worst(kind):
    each, draw = learner(kind), np.random.default_rng(0)
    x = torch.randn(40, 16)
    each.step(x)
    before = tensors(each.sae)
    each.idle[:] = 0
    each.idle[[3, 7]] = 100
    x[11] = 50 * F.normalize(torch.randn(16), dim=0)
    live = [i for i in range(32) if i not in (3, 7)]
    each.resample(x, 100, draw)
    after = tensors(each.sae)
    row = F.normalize(x[11] - before["b_dec"], dim=0)
    for dead in 3, 7:
        torch.testing.assert_close(after["W_dec"][dead], row)
        scale = 0.2 * before["W_enc"][:, live].norm(dim=0).mean()
        torch.testing.assert_close(after["W_enc"][:, dead], scale * row)
        assert after["b_enc"][dead] == 0 and each.idle[dead] == 0
    for name, kept in (("W_dec", (live,)), ("W_enc", (slice(None), live)), ("b_enc", (live,))):
        assert after[name][kept].equal(before[name][kept]), name
    state = {name: each.optimizer.state[parameter] for name, parameter in each.sae.named_parameters()}
    for moment in "exp_avg", "exp_avg_sq":
        for name, gone in (("W_dec", ([3, 7],)), ("W_enc", (slice(None), [3, 7])), ("b_enc", ([3, 7],))):
            assert (state[name][moment][gone] == 0).all() and (state[name][moment] != 0).any(), name
        assert (state["b_dec"][moment] != 0).all()
    each.resample(x, 101, draw)
    assert all(after[name].equal(tensor) for name, tensor in tensors(each.sae).items())


def planted(n: int, d: int = 24, atoms: int = 36, active: float = 2.0):
    """Tokens that are sparse non-negative mixtures of known unit atoms."""
    draw = torch.Generator(torch.get_default_device()).manual_seed(5)
    dictionary = F.normalize(torch.randn(atoms, d, generator=draw), dim=1)
    on = torch.rand(n, atoms, generator=draw) < active / atoms
    amounts = on * (0.5 + torch.rand(n, atoms, generator=draw))
    return amounts @ dictionary, dictionary


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_planted_dictionary_is_found(kind):
    device = torch.get_default_device()
    x, dictionary = (values.to(device) for values in planted(30_000))
    x = x[x.norm(dim=1) > 0]
    settings = SaeConfig(24, 2, kind, l1=0.2, k=2)
    each = Learner(Sae(settings), 3e-3)
    start = (dictionary @ each.sae.W_dec.mT).amax(1).mean()
    for epoch in range(12):
        for batch in x.split(256):
            each.step(batch)
        if epoch in (2, 5):
            each.resample(x, 1000, np.random.default_rng(epoch))
    found = (dictionary @ each.sae.W_dec.mT).amax(1)
    assert start < 0.7 and float((found > 0.9).float().mean()) > 0.8
    with torch.no_grad():
        l0 = float((each.sae.encode(x) > 0).sum(1).float().mean())
        back = each.sae(x)
    assert l0 < 5 and (back - x).square().sum() < 0.15 * (x - x.mean(0)).square().sum()
    if kind == "batchtopk":
        assert l0 == pytest.approx(2, rel=0.15)  # the threshold lets through what the largest k·n did


# The stream


def test_a_block_is_the_activations_of_whole_pieces_in_random_order():
    model, text, r = talkative(cl.Crate), corpus(500), recipe()
    pieces = np.array([(s, min(s + 12, stop)) for start, stop in spans(text) for s in range(start, stop, 12)])
    activations = ActivationBlocks(model, text, [1], r.buffer, r.seed)
    blocks = [activations.read(block) for block in (0, 0, 1)]
    assert blocks[0].equal(blocks[1]) and not blocks[0][0, :30].equal(blocks[2][0, :30])
    seen = []
    model.blocks[1].neurons.register_forward_hook(lambda m, i, x: seen.append(x[0].detach()))
    size = {}
    for start, stop in pieces:
        model(torch.as_tensor(text[start:stop].astype(np.int64))[None])
        size[start] = stop - start
    every = torch.cat(seen)
    which = torch.cdist(blocks[0][0], every).min(1)
    assert which.values.max() < 1e-3
    n_pieces = recipe().buffer // 2 // 12
    assert min(size.values()) * n_pieces <= blocks[0].shape[1] <= 12 * n_pieces


def spans(text):
    return [text.document_span(i) for i in range(text.n_documents)]


def test_every_piece_and_every_token_of_it_is_equally_likely():
    class Positions(torch.nn.Module):
        """Neurons that say which token of the corpus this is."""

        def __init__(self):
            super().__init__()
            self.config = cl.Gpt2Config(n_layers=1, n_heads=1, width=1, vocab_size=500, context=12, expansion=1)
            self.token_embedding = torch.nn.Embedding(1, 1)
            self.blocks = torch.nn.ModuleList([torch.nn.Module()])
            self.blocks[0].neurons = torch.nn.Identity()

        def forward(self, tokens):
            return self.blocks[0].neurons(tokens[..., None].float())

    document = corpus(500)
    text = TokenizedCorpus.from_arrays(
        np.arange(500), np.repeat(np.arange(document.n_documents), [b - a for a, b in spans(document)]),
        ["a"] * document.n_documents, 500,
    )  # fmt: skip
    activations = ActivationBlocks(Positions(), text, [0], buffer=2400, seed=0)
    counts = torch.zeros(500, device="cpu")
    for block in range(40):
        found = activations.read(block)[0, :, 0]
        assert (found.diff() == 1).float().mean() < 0.05  # neighbours in the text are none here
        counts += torch.bincount(found.long().cpu(), minlength=500).cpu()
    expected = counts.sum() / 500
    assert expected > 40 and (counts - expected).abs().max() < 6 * expected**0.5


def test_memory_does_not_grow_with_the_text(monkeypatch):
    peaks, calls = [], count()
    step = Learner.step

    def measured(self, x):
        if next(calls) % 20:
            return step(self, x)
        storages = [t.untyped_storage() for t in all_tensors() if t.layout is torch.strided]  # other tests hold others
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        peaks[-1] = max(peaks[-1], sum(held.values()))
        return step(self, x)

    def all_tensors():
        kinds = torch.Tensor, torch.nn.Parameter
        return (held for held in gc.get_objects() if type(held) in kinds and held.layout == torch.strided)

    monkeypatch.setattr(Learner, "step", measured)
    for length in 1200, 4800:
        text = TokenizedCorpus.from_arrays(np.arange(length) % 19, np.arange(length) // 12, ["a"] * (length // 12), 19)
        gc.collect()
        peaks.append(0)
        train_saes(talkative(), text, corpus(200), config(), recipe=recipe(max_tokens=length))
    assert peaks[1] < 1.02 * peaks[0]


# Whole trainings


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_reconstructs_better_and_says_how_it_went(kind):
    model, weights = talkative(), {}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    validation = corpus(150, seed=1)
    found = train_saes(model, corpus(3000), validation, config(kind), recipe=recipe(max_tokens=12_000))
    assert list(found.saes) == [0, 1] and len(found.curve) == 10
    first, last = found.curve[:2], found.curve[-2:]
    assert [row["layer"] for row in last] == [0, 1] and last[0]["tokens"] >= 12_000 > found.curve[-3]["tokens"]
    assert found.stopped == f"all {last[0]['tokens']} tokens were read"
    for before, after, (layer, scores) in zip(
        first, last, evaluate_sae(model, validation, found.saes, 150).items(), strict=True
    ):
        assert after["loss"] < before["loss"] and after["explained_variance"] > before["explained_variance"]
        assert after["explained_variance"] == pytest.approx(scores.explained_variance)
        assert (after["l0"], after["recovered"], after["dead"]) == (scores.l0, scores.recovered, scores.dead)
        assert after["layer"] == layer
        if kind == "batchtopk":
            assert scores.l0 == pytest.approx(3, rel=0.3) and after["threshold"] > 0
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in weights.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    json.dumps(found.curve)


def test_one_layer_alone_is_the_same_as_among_others():
    both = train_saes(talkative(), corpus(), corpus(200), config(), recipe=recipe())
    alone = train_saes(talkative(), corpus(), corpus(200), config(), [0], recipe())
    torch.testing.assert_close(tensors(alone.saes[0]), tensors(both.saes[0]))
    assert list(alone.saes) == [0]


def test_the_bias_starts_as_the_mean_of_the_first_block():
    model, text, r = talkative(), corpus(), recipe(max_tokens=1, learning_rate=1e-30)
    (x,) = ActivationBlocks(model, text, [1], r.buffer, r.seed).read(0)
    torch.testing.assert_close(train_saes(model, text, text, config(), [1], r).saes[1].b_dec.detach(), x.mean(0))


def test_rebirths_come_at_the_stated_shares_in_every_layer(monkeypatch):
    calls, tokens, step = [], [0], Learner.step

    def counting(self, x):
        tokens[0] += len(x)
        return step(self, x)

    monkeypatch.setattr(Learner, "step", counting)
    monkeypatch.setattr(Learner, "resample", lambda self, x, patience, draw: calls.append((tokens[0] // 2, patience)))
    train_saes(talkative(), corpus(), corpus(200), config(), None, recipe(resample_at=(0.3, 0.7)))
    assert [patience for _, patience in calls] == [150] * 4
    assert 900 <= calls[0][0] == calls[1][0] < 1300 and 2100 <= calls[2][0] == calls[3][0] < 2500


def test_the_seed_alone_decides_and_torchs_own_generator_is_left_alone():
    model, found = talkative(), []
    for start, seed in (1, 0), (2, 0), (1, 3):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        done = train_saes(model, corpus(), corpus(200), config(), [1], recipe(max_tokens=400, seed=seed))
        assert torch.get_rng_state().equal(before)
        found.append(done.saes[1].W_dec)
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


def test_training_ends_when_nothing_is_gained():
    stopped = train_saes(talkative(), corpus(), corpus(200), config(), recipe=recipe(least_gain=1e9, evaluations=30))
    tokens = stopped.curve[-1]["tokens"]
    assert 750 <= tokens < 1500 and stopped.stopped.startswith(f"in the last quarter of {tokens} tokens recovered")


@pytest.mark.parametrize("gain, fall, stops", [(0.0, 0.0, True), (0.02, 0.0, False), (0.0, 0.02, False)])
def test_either_gain_keeps_training_going(gain, fall, stops):
    rows = [
        {"tokens": tokens, "layer": layer, "recovered": 0.9 + gain * layer * i, "loss": 1 - fall * layer * i}
        for i, tokens in enumerate((600, 800))
        for layer in (0, 1)
    ]
    assert bool(SaeRecipe(max_tokens=1000).reason_to_stop(rows)) == stops
    assert not SaeRecipe(max_tokens=4000).reason_to_stop(rows)
    assert not SaeRecipe(max_tokens=1000).reason_to_stop(rows[2:])


def test_the_rate_falls_linearly_over_the_last_share():
    r = SaeRecipe(max_tokens=1000, learning_rate=0.5, decay=0.4)
    rates = [r.rate(tokens) for tokens in (0, 600, 700, 900, 1000, 1010)]
    assert rates == pytest.approx([0.5, 0.5, 0.375, 0.125, 0, 0])
    assert SaeRecipe(max_tokens=1000, learning_rate=0.5).rate(1000) == 0.5


def test_the_rate_of_the_recipe_is_that_of_the_steps(monkeypatch):
    rates, step = [], Learner.step

    def noted(self, x):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, x)

    monkeypatch.setattr(Learner, "step", noted)
    r = recipe(decay=1.0, learning_rate=1e-2, least_gain=1e9)
    trained = train_saes(talkative(), corpus(), corpus(200), config(), [0], r)
    assert "tokens were read" in trained.stopped  # a descent is not left half-way
    assert rates[0] == 1e-2 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 1e-3


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    for kind in KINDS:
        arguments = dict(config=config(kind), recipe=recipe(resample_at=(0.3, 0.7), decay=0.5))
        whole = train_saes(talkative(), corpus(), corpus(200), **arguments)
        for kill_at in 3, 23, 38:
            folder, calls = tmp_path / f"{kind}-{kill_at}", []
            step = Learner.step

            def dying(self, x, calls=calls, step=step, kill_at=kill_at):
                calls.append(1)
                if len(calls) == 2 * kill_at:
                    raise Killed
                return step(self, x)

            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(Learner, "step", dying)
                train_saes(talkative(), corpus(), corpus(200), **arguments, run_dir=folder)
            resumed = train_saes(talkative(), corpus(), corpus(200), **arguments, run_dir=folder)
            assert resumed.curve == whole.curve and resumed.stopped == whole.stopped
            for layer, sae in whole.saes.items():
                assert all(tensors(sae)[name].equal(tensor) for name, tensor in tensors(resumed.saes[layer]).items())
                loaded = Sae.load(folder / f"layer-{layer}")
                assert loaded.W_enc.cpu().equal(sae.W_enc.cpu()) and loaded.config == sae.config


def test_a_kill_while_the_run_is_written_down_is_in_nobodys_way(tmp_path, monkeypatch):
    arguments = dict(config=config("relu"), recipe=recipe(), run_dir=tmp_path)

    def dying(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("cratelab.storage.os.replace", dying)
        train_saes(talkative(), corpus(), corpus(200), **arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]
    (tmp_path / "run.json.4711-0a1b2c3d.part").write_text("{")  # what a kill leaves that nothing can catch
    train_saes(talkative(), corpus(), corpus(200), **arguments)
    assert (tmp_path / "layer-0" / "cfg.json").is_file()


def test_a_finished_run_is_returned_as_it_is(tmp_path, monkeypatch):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(), tmp_path
    done = train_saes(*arguments)
    monkeypatch.setattr(Learner, "step", lambda self, x: pytest.fail("trained again"))
    again = train_saes(*arguments)
    assert again.curve == done.curve and again.saes[1].W_dec.equal(done.saes[1].W_dec)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(), tmp_path
    whole = train_saes(*arguments[:-1])
    save, calls = storage.save_file, count(1)

    def dying(tensors, file, metadata):
        if next(calls) == 3:
            file.write_bytes(b"half")
            raise Killed
        save(tensors, file, metadata)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "save_file", dying)
        train_saes(*arguments)
    assert train_saes(*arguments).saes[1].W_dec.equal(whole.saes[1].W_dec)


def test_what_killed_writers_left_is_removed_finished_layers_included(tmp_path):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(max_tokens=300), tmp_path
    train_saes(*arguments)
    written = [*tmp_path.rglob("*")]
    (latest,) = tmp_path.glob("checkpoint-*")
    of_checkpoint = f"{latest.name}/layer-1.safetensors", f"{latest.name}/progress.json"
    for path in "run.json", *of_checkpoint, "layer-1/cfg.json", "layer-1/sae_weights.safetensors":
        (tmp_path / f"{path}.7-00c0ffee.part").write_bytes(b"half")
    shutil.copytree(latest, tmp_path / "checkpoint-9999", ignore=lambda *names: ["progress.json"])  # not whole
    shutil.copytree(latest, tmp_path / "checkpoint-10")  # which a kill kept from being removed
    (tmp_path / "layer-1" / "mine.part").write_bytes(b"not ours")
    (tmp_path / "checkpoint-mine").mkdir()
    train_saes(*arguments)
    assert {*tmp_path.rglob("*")} == {*written, tmp_path / "layer-1" / "mine.part", tmp_path / "checkpoint-mine"}


def test_another_run_or_other_files_are_not_touched(tmp_path):
    train_saes(talkative(), corpus(), corpus(200), config(), [1], recipe(), tmp_path / "run")
    other = talkative()
    with torch.no_grad():
        other.norm.weight[0] += 1
    for changes, complaint in (
        (dict(recipe=recipe(batch=32)), "another recipe .*batch was 64, now 32"),
        (dict(config=config("batchtopk")), "another sae .*kind was relu, now batchtopk"),
        (dict(layers=[0]), r"another sae .*layers was \[1\], now \[0\]"),
        (dict(model=other), "another model .*sha256"),
        (dict(training=corpus(seed=4)), "another training .*sha256"),
    ):
        usual = dict(model=talkative(), training=corpus(), validation=corpus(200), config=config(), layers=[1])
        with pytest.raises(ValueError, match=complaint):
            train_saes(**usual | dict(recipe=recipe(), run_dir=tmp_path / "run") | changes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        train_saes(talkative(), corpus(), corpus(200), config(), [1], recipe(), tmp_path / "mine")


FILES = ["layer-1.safetensors", "progress.json"]
DAMAGES = ["truncated", "zeros", "flipped", "stateless", "lacking", "of another run", "empty"]


@pytest.mark.parametrize("name, damage", [*product(FILES, DAMAGES), *product(FILES[:1], ["of another layer", "gone"])])
def test_a_damaged_checkpoint_is_named_and_what_to_do(tmp_path, name, damage):
    arguments = talkative(), corpus(), corpus(200), config(), [0, 1], recipe(max_tokens=600, evaluations=2), tmp_path
    whole = train_saes(*arguments)
    (folder,) = tmp_path.glob("checkpoint-*")
    file, is_state = folder / name, name == "progress.json"
    content = file.read_bytes()
    if damage in ("stateless", "lacking") and is_state:
        file.write_text(json.dumps({"run": json.loads(content)["run"]} if damage == "lacking" else {}))
    elif damage in ("stateless", "lacking"):
        held = {name: tensor for name, tensor in storage.read_tensors(file).items() if name != "idle"}
        storage.save_file(held, file, storage.read_metadata(file) if damage == "lacking" else None)
    elif damage == "of another run":
        other = recipe(max_tokens=600, evaluations=2, learning_rate=1e-4)  # the same stream
        train_saes(*arguments[:5], other, tmp_path / "other")
        file.write_bytes((tmp_path / "other" / folder.name / name).read_bytes())
    elif damage == "of another layer":
        file.write_bytes((folder / "layer-0.safetensors").read_bytes())
    elif damage == "gone":
        file.unlink()
    else:
        half = len(content) // 2  # what a loss of power leaves
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        damaged = dict(truncated=content[:-100], zeros=content[:half] + bytes(len(content) - half), flipped=flipped)
        file.write_bytes((damaged | {"empty": b""})[damage])
    with pytest.raises(ValueError, match=f"{name} .*Remove .*{folder.name}, and the run begins anew"):
        train_saes(*arguments)
    shutil.rmtree(folder)
    assert train_saes(*arguments).saes[1].W_dec.equal(whole.saes[1].W_dec)


def test_two_never_train_in_one_folder(tmp_path):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(max_tokens=600, evaluations=2), tmp_path
    with storage.locked(tmp_path / "lock"), pytest.raises(BlockingIOError, match="another process trains in"):
        train_saes(*arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]
    train_saes(*arguments)  # a lock that nobody holds is in nobody's way


def test_a_full_disk_is_an_oserror_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(), tmp_path
    whole, save, calls = train_saes(*arguments[:-1]), storage.save_file, count(1)

    def full(tensors, file, metadata):
        if next(calls) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, file, metadata)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"layer-1\.safetensors .*No space left"):
        patch.setattr(storage, "save_file", full)
        train_saes(*arguments)
    assert train_saes(*arguments).saes[1].W_dec.equal(whole.saes[1].W_dec)


def test_files_of_the_user_in_the_folder_stay(tmp_path):
    arguments = talkative(), corpus(), corpus(200), config(), [1], recipe(max_tokens=600, evaluations=2), tmp_path
    train_saes(*arguments)
    mine = ["notes.txt", "checkpoint-best.safetensors", "checkpoint-best/progress.json", "checkpoint-7/letter"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("dear")
    train_saes(*arguments)
    assert [(tmp_path / name).read_text() for name in mine] == ["dear"] * 4


# Silence, and numbers that are none


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_silent_batch_does_no_harm(kind):
    each, x = learner(kind), torch.relu(torch.randn(30, 16))
    for batch in torch.zeros(30, 16), x, torch.zeros(30, 16), 1e-20 * x, x:
        loss = each.step(batch)
        assert loss.isfinite() and each.is_finite()
    assert loss < 3  # a silent batch has not thrown it far off
    each.resample(torch.zeros(30, 16), 0, np.random.default_rng(0))
    each.resample(each.sae.b_dec.detach().repeat(30, 1), 0, np.random.default_rng(0))
    assert each.is_finite() and each.step(x).isfinite()


def silenced(layer: int = 0, kind=cl.Gpt2) -> cl.LanguageModel:
    """A model of which one layer's neurons are always 0."""
    model = talkative(kind)
    with torch.no_grad():
        model.blocks[layer].mlp_in.weight.zero_()
    return model


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_dead_layer_is_trained_through_and_what_is_undefined_is_none(tmp_path, kind):
    arguments = silenced(), corpus(), corpus(200), config(kind), None, recipe(resample_at=(0.3,)), tmp_path
    found = train_saes(*arguments)
    assert found.stopped.startswith("all ") and all(
        tensor.isfinite().all() for tensor in tensors(found.saes[0]).values()
    )
    dead, live = ([row for row in found.curve if row["layer"] == layer] for layer in (0, 1))
    assert {(row["recovered"], row["explained_variance"]) for row in dead} == {(None, None)}
    assert all(np.isfinite(row["recovered"]) and np.isfinite(row["loss"]) for row in live)
    assert json.loads(json.dumps(found.curve, allow_nan=False)) == found.curve
    assert train_saes(*arguments).curve == found.curve


def test_undefined_scores_neither_end_nor_prolong_training():
    rows = [
        {"tokens": tokens, "layer": layer, "recovered": [None, gain * i][layer], "loss": [0.0, 1.0][layer]}
        for gain in (0.02, 0.0)
        for i, tokens in enumerate((600, 800))
        for layer in (0, 1)
    ]
    assert not SaeRecipe(max_tokens=1000).reason_to_stop(rows[:4])
    assert "nan" not in SaeRecipe(max_tokens=1000).reason_to_stop(rows[4:])
    assert SaeRecipe(max_tokens=1000).reason_to_stop(rows[4:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_by_layer(value):
    model = talkative()
    model.blocks[1].neurons.register_forward_hook(lambda m, i, x: x + value)
    with pytest.raises(ValueError, match=r"layer 1.*(not finite|NaN or infinite)"):
        train_saes(model, corpus(), corpus(200), config(), None, recipe())
    with pytest.raises(ValueError, match=r"layer 1.*(not finite|NaN or infinite)"):
        evaluate_sae(model, corpus(200), {0: Sae(config()), 1: Sae(config())})


def test_activations_beyond_float32_are_named_by_layer():
    model = talkative().double()
    model.blocks[1].neurons.register_forward_hook(lambda m, i, x: 1e39 * x)
    with pytest.raises(ValueError, match=r"layer 1.*not finite"):
        train_saes(model, corpus(), corpus(200), config(), None, recipe())


def test_constant_neurons_have_no_variance_to_explain():
    model = talkative()
    model.blocks[0].neurons.register_forward_hook(lambda m, i, x: torch.full_like(x, 0.1))
    scores = evaluate_sae(model, corpus(200), {0: Sae(config())})[0]
    assert np.isnan(scores.explained_variance) and np.isfinite(scores.ce_spliced)


@pytest.mark.parametrize("how", ["weights", "spliced"])
def test_a_diverged_state_never_replaces_a_good_one(tmp_path, monkeypatch, how):
    """After the last step too, whose loss is of the weights before it."""
    plan = recipe(max_tokens=600, evaluations=3)
    arguments = talkative(), corpus(), corpus(200), config(), None, plan, tmp_path
    evaluations = count(1)

    def spoiling(model, corpus, saes, n_tokens):
        found = evaluate_sae(model, corpus, saes, n_tokens)
        if next(evaluations) == 2 and how == "spliced":
            found[1].ce_spliced = float("inf")
        return found

    step = Learner.step

    def last(self, x):
        loss = step(self, x)
        if how == "weights" and [*tmp_path.glob("checkpoint-*/progress.json")]:
            with torch.no_grad():
                self.sae.b_enc[0] = torch.inf
        return loss

    with monkeypatch.context() as patch, pytest.raises(Diverged, match=r"checkpoint-\d+ is from before"):
        patch.setattr(trainer, "evaluate_sae", spoiling)
        patch.setattr(Learner, "step", last)
        train_saes(*arguments)
    (file,) = tmp_path.glob("checkpoint-*/progress.json")
    assert len(json.loads(file.read_text())["curve"]) == 2  # of the first evaluation
    assert train_saes(*arguments).curve == train_saes(*arguments[:-1]).curve


def test_one_step_alone_is_judged_too(tmp_path):
    with pytest.raises(Diverged, match=r"(?!.*from before)"):
        train_saes(
            talkative(), corpus(), corpus(200), config(), None, recipe(learning_rate=1e38, max_tokens=1), tmp_path
        )
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "lock"}


def test_one_token_a_step_is_possible():
    found = train_saes(talkative(), corpus(), corpus(200), config(), [0], recipe(max_tokens=60, buffer=50, batch=1))
    assert all(np.isfinite(row["loss"]) for row in found.curve)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("model", [cl.Crate, cl.Gpt2])
def test_models_of_every_precision_are_trained_on(model, dtype, tolerance, tmp_path):
    arguments = corpus(), corpus(200), config(), [0], recipe(max_tokens=600, evaluations=2)
    expected = train_saes(talkative(model), *arguments)
    found = train_saes(talkative(model).to(dtype), *arguments, tmp_path)
    assert found.saes[0].W_enc.dtype == torch.float32 and found.stopped == expected.stopped
    assert found.curve[-1]["loss"] == pytest.approx(expected.curve[-1]["loss"], rel=tolerance)
    train_saes(talkative(model).to(dtype), *arguments, tmp_path)
    with pytest.raises(ValueError, match=r"another model .*sha256"):
        train_saes(talkative(model), *arguments, tmp_path)


def test_a_lost_loss_ends_training_with_a_clear_error(tmp_path):
    with pytest.raises(
        Diverged, match=r"after \d+ tokens the losses of layers \[0, 1\] are .*(nan|inf).*lower learning"
    ):
        train_saes(talkative(), corpus(), corpus(200), config(), None, recipe(learning_rate=1e25), tmp_path)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(config=SaeConfig(32)), "the model has 64 neurons a layer, the auto-encoder reads 32"),
        (dict(config=SaeConfig(64, kind="jumprelu")), '"jumprelu" is read from files'),
        (dict(layers=[2]), r"layers must be some of 0 to 1, each once; got \[2\]"),
        (dict(layers=[0, 0]), "each once"),
        (dict(layers=[]), "each once"),
        (dict(layers=[-1]), "layers must be some of 0 to 1"),
        (dict(layers=[0.0]), "layers must be some of 0 to 1"),
        (dict(layers=[True]), "layers must be some of 0 to 1"),
        (dict(layers=[[0]]), "layers must be some of 0 to 1"),
        (
            dict(validation=TokenizedCorpus.from_arrays(np.arange(1), np.zeros(1, int), ["a"], 19)),
            "the first 1 tokens of the corpus hold none that follows another",
        ),
        (dict(recipe=recipe(validation_tokens=1)), "the first 1 tokens of the corpus hold none"),
        (dict(training=TokenizedCorpus.from_arrays(np.arange(0), np.zeros(0, int), [], 19)), "holds no token"),
        (
            dict(training=TokenizedCorpus.from_arrays(np.arange(30), np.zeros(30, int), ["a"], 30)),
            "the training corpus has 30 tokens, the model knows 19",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(tmp_path, changes, complaint):
    usual = dict(model=talkative(), training=corpus(), validation=corpus(200), config=config(), layers=[0])
    with pytest.raises(ValueError, match=complaint):
        train_saes(**usual | dict(recipe=recipe(), run_dir=tmp_path / "run") | changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(max_tokens=0), dict(batch=0), dict(learning_rate=0), dict(evaluations=0), dict(least_gain=0 * 1e999)),
        *(dict(max_tokens=float("nan")), dict(batch=2.0), dict(buffer=True), dict(learning_rate=float("nan"))),
        *(dict(seed=-1), dict(seed=2**32), dict(seed=0.5), dict(resample_at=[float("nan")]), dict(resample_at=[-0.1])),
        *(
            dict(resample_at="a"),
            dict(resample_at=None),
            dict(resample_at=0.5),
            dict(decay=1.5),
            dict(decay="x"),
            dict(learning_rate="x"),
            dict(least_gain=None),
        ),
    ],
)
def test_impossible_recipes_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be (at least|from 0 to|positive|shares|a number)"):
        SaeRecipe(**changes)


class Largest(architectures.JumpRelu):
    """A new architecture: the k largest of each token, in training and in use."""

    saelens, trained, has_threshold = "largest", True, False

    def code(self, pre, threshold):
        largest = pre.topk(self.config.k, -1)
        return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())


def test_a_new_architecture_is_one_class(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="kind must be one of"):
        SaeConfig(WIDTH, 2, "largest", k=3)
    monkeypatch.setitem(architectures.ARCHITECTURES, "largest", Largest)
    model, config = talkative(), SaeConfig(WIDTH, 2, "largest", k=3)
    trained = train_saes(model, corpus(), corpus(200), config, [1], recipe(), tmp_path)
    assert trained.curve[-1]["explained_variance"] > trained.curve[0]["explained_variance"]
    loaded = Sae.load(tmp_path / "layer-1")
    assert loaded.config == config
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(loaded(x.cpu()), trained.saes[1](x).cpu())
    assert ((loaded.encode(x.cpu()) > 0).sum(1) <= 3).all() and evaluate_sae(model, corpus(200), {1: loaded})[1].l0 <= 3
