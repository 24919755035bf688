"""Several processes that share auto-encoders or steering reach what one does, and killed ones go on."""

import json
import textwrap
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from many_processes import launch
from test_sae import random_sae, talkative
from test_sae_training import config, recipe
from test_training import corpus

import cratelab as cl
from cratelab import shared_pass
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.records import collect_records
from cratelab.sae import SaeScores, SaeTraining, evaluate_sae, fidelity, splice, splicing, train_saes
from cratelab.sae.learner import Learner
from cratelab.shared_pass import RunningSums
from cratelab.steering import Frontier, control_tokens, cost, effects, frontier, full_effect, token_counts
from cratelab.storage import read_tensors, write_json, write_tensors

SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import test_shared_work
    test_shared_work.in_one_of_many(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
"""
CLOSE = dict(rtol=1e-12, atol=1e-13)  # sums in another order, in double precision


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the processes that are started have: more threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_model() -> cl.LanguageModel:
    torch.manual_seed(0)
    return talkative(cl.Crate, n_layers=3)


def train(folder: Path | None = None) -> SaeTraining:
    plan = recipe(max_tokens=4000, batch=50, resample_at=(0.3, 0.5), evaluations=4)
    return train_saes(
        a_model(), corpus(1500), corpus(200, seed=1), config("batchtopk", expansion=8), None, plan, folder
    )


def score(folder: Path | None = None) -> dict[int, SaeScores]:
    model = a_model()
    saes = {layer: random_sae(expansion=1 + layer) for layer in range(3)}
    return evaluate_sae(model, corpus(400, seed=2), saes, 350, batch=5, first=False, folder=folder)


def steering(folder: Path | None = None, error_term: bool = False) -> tuple[Frontier, torch.Tensor]:
    """Both of an arm that is spliced in, so that nothing but `within` tells it from another."""
    model = a_model()
    sae, contexts = random_sae(), torch.randint(0, 19, (13, 6))
    neurons, maxima = torch.tensor([3, 8, 1, 30]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    targets = torch.zeros(4, model.config.vocab_size, dtype=torch.bool)
    targets[range(4), [2, 5, 7, 11]] = True
    controls = control_tokens(targets, token_counts(corpus(), model.config.vocab_size), n_bins=4)

    def within():
        return splice(model, {1: sae}, error_term)

    found = frontier(model, contexts, 1, neurons, maxima, targets, controls, (1.0, 4.0), within, batch=2, folder=folder)
    with within():
        return found, full_effect(model, contexts, 1, neurons, maxima, batch=3, folder=folder)


def in_one_of_many(what: str, folder: Path, out: Path, kill_after: int) -> None:
    """What each of the started processes does; the second kills itself after so many steps."""
    import os
    import signal
    import time

    from cratelab.sae import run_folder

    shared_pass.KEEP_EVERY = 0
    rank, done, add, step = os.environ["RANK"], [], RunningSums.add, Learner.step
    out.mkdir(exist_ok=True)

    def counted(call, result):
        if rank == "1" and len(done) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(call)
        return result()

    if what == "writing saes":
        write = run_folder.write_tensors

        def late(*arguments):
            time.sleep(rank == "1")
            counted("write", lambda: write(*arguments))

        run_folder.write_tensors = late
    elif what == "saes":
        Learner.step = lambda self, x: counted("step", lambda: step(self, x))
    else:
        RunningSums.add = lambda self, batch, *rest: counted(batch, lambda: add(self, batch, *rest))
    if "saes" in what:
        found = train(folder / "run")
        write_json(out / f"{rank}.json", {"curve": found.curve, "stopped": found.stopped, "steps": done.count("step")})
        for layer, sae in found.saes.items():
            write_tensors(out / f"{rank}-{layer}.safetensors", sae.state_dict())
    else:
        (front, effect), scores = steering(folder / "passes"), score(folder / "passes")
        write_json(out / f"{rank}.json", {"batches": done})
        write_tensors(out / f"{rank}.safetensors", as_tensors(front, effect, scores))


def as_tensors(front: Frontier, effect: torch.Tensor, scores: dict[int, SaeScores]) -> dict[str, torch.Tensor]:
    numbers = {f"{layer} {name}": held for layer, each in scores.items() for name, held in vars(each).items()}
    return {
        name: torch.as_tensor(held, dtype=torch.float64).cpu()
        for name, held in (vars(front) | {"effect": effect} | numbers).items()
    }


def start(processes: int, what: str, folder: Path, out: Path, kill_after: int = -1):
    return launch(processes, textwrap.dedent(SCRIPT), what, folder, out, kill_after)


def succeeded(done) -> bool:
    assert done.returncode == 0, done.stderr[-3000:]
    return True


def check_trained(out: Path, processes: int, expected: SaeTraining) -> None:
    """Every layer is trained by one process, and is what one makes of it."""
    files = {file.stem: read_tensors(file) for file in out.glob("*.safetensors")}
    assert sorted(files) == sorted(f"{layer % processes}-{layer}" for layer in expected.saes)
    for name, held in files.items():
        for part, tensor in expected.saes[int(name[2:])].state_dict().items():
            assert held[part].equal(tensor.cpu()), (name, part)
    for rank in range(processes):
        told = json.loads((out / f"{rank}.json").read_text())
        assert told["curve"] == expected.curve and told["stopped"] == expected.stopped


@pytest.fixture(scope="module")
def trained() -> SaeTraining:
    return train()


def test_dead_features_are_drawn_for_layer_after_layer_by_one_generator(monkeypatch, trained):
    """As one process would draw; a process that trains some layers passes over the draws of the others."""
    states, resample = [], Learner.resample

    def noted(self, x, patience, draw):
        assert self.n_dead(patience)
        before = draw.bit_generator.state
        resample(self, x, patience, draw)
        states.append((before, draw.bit_generator.state))

    monkeypatch.setattr(Learner, "resample", noted)
    assert train().curve == trained.curve and len(states) == 6
    for first in 0, 3:
        (_, first_ends), (second_begins, second_ends), (third_begins, _) = states[first : first + 3]
        assert first_ends == second_begins and second_ends == third_begins
    assert states[0][0] != states[3][0]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_layers_and_train_what_one_trains(processes, trained, tmp_path):
    assert succeeded(start(processes, "saes", tmp_path, tmp_path / "out"))
    check_trained(tmp_path / "out", processes, trained)
    for layer, sae in trained.saes.items():
        loaded = cl.sae.Sae.load(tmp_path / "run" / f"layer-{layer}")
        assert loaded.W_dec.equal(sae.W_dec.cpu())


def test_a_killed_training_goes_on_with_another_number_of_processes_or_one(trained, tmp_path):
    assert start(2, "saes", tmp_path, tmp_path / "killed", kill_after=30).returncode
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*/progress.json")
    assert 0 < json.loads(checkpoint.read_text())["tokens"] < 3000
    assert succeeded(start(3, "saes", tmp_path, tmp_path / "out"))
    check_trained(tmp_path / "out", 3, trained)
    assert json.loads((tmp_path / "out" / "2.json").read_text())["steps"] < 70  # of 80: it did not begin anew
    alone = train(tmp_path / "run")
    assert alone.curve == trained.curve and list(alone.saes) == [0, 1, 2]


def test_a_checkpoint_counts_only_when_all_have_written(trained, tmp_path):
    assert start(3, "writing saes", tmp_path, tmp_path / "killed", kill_after=1).returncode
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*/progress.json")] == ["progress.json"]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
    assert train(tmp_path / "run").curve == trained.curve


def test_more_processes_than_layers_are_too_many(tmp_path):
    done = start(4, "saes", tmp_path, tmp_path / "out")
    assert done.returncode and "every process trains whole layers, and there are 4 for 3: start fewer" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def measured() -> dict[str, torch.Tensor]:
    front, effect = steering()
    return as_tensors(front, effect, score())


def check_measured(out: Path, expected: dict[str, torch.Tensor]) -> None:
    for file in out.glob("*.safetensors"):
        torch.testing.assert_close(read_tensors(file), expected, **CLOSE)


def batches(out: Path) -> list[list[int]]:
    return [json.loads(file.read_text())["batches"] for file in sorted(out.glob("*.json"))]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_frontiers_effects_and_scores(processes, measured, tmp_path):
    assert succeeded(start(processes, "steering", tmp_path, tmp_path / "out"))
    check_measured(tmp_path / "out", measured)
    shares = batches(tmp_path / "out")
    n_batches = 7 + 5 + -(-len(pieces()) // 5)
    assert len(shares) == processes and sum(map(len, shares)) == n_batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 3  # of three passes


def pieces() -> list:
    from cratelab.reading import pieces_of

    return list(pieces_of(corpus(400, seed=2), a_model().config.context, True, 350))


def test_killed_passes_go_on_in_one_process(measured, tmp_path, monkeypatch):
    assert start(3, "steering", tmp_path, tmp_path / "out", kill_after=3).returncode
    held = [read_tensors(file)["read"].tolist()[1:] for file in (tmp_path / "passes").glob("*/process-*")]
    assert len(list(chain(*held))) >= 3
    read, add = [], RunningSums.add
    monkeypatch.setattr(RunningSums, "add", lambda self, batch, *rest: read.append(batch) or add(self, batch, *rest))
    front, effect = steering(tmp_path / "passes")
    assert len(read) == 7 + 5 - len(list(chain(*held)))
    torch.testing.assert_close(as_tensors(front, effect, score(tmp_path / "passes")), measured, **CLOSE)


def test_arms_that_only_the_splice_tells_apart_are_passes_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    expected = [steering(None, error_term) for error_term in (False, True)]
    found = [steering(tmp_path, error_term) for error_term in (False, True)]
    for (front, effect), (other, other_effect) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(front.off_target, other.off_target)
        assert effect.equal(other_effect)
    assert not found[0][0].off_target.equal(found[1][0].off_target)
    assert len(list(tmp_path.glob("*/process-0.safetensors"))) == 4


@pytest.mark.parametrize("change", ["layer", "contexts", "neurons", "maxima", "targets", "controls", "batch"])
def test_whatever_decides_about_a_frontier_makes_another_pass(change, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, m = a_model(), 2
    targets = torch.eye(model.config.vocab_size, dtype=torch.bool)[:m]
    given = dict(contexts=torch.randint(0, 19, (5, 6)), layer=1, neurons=torch.tensor([3, 8]), maxima=torch.ones(m))
    given |= dict(targets=targets, controls=~targets, batch=2)
    frontier(model, **given, folder=tmp_path)
    others = dict(layer=0, contexts=given["contexts"].flip(1), neurons=torch.tensor([3, 9]), maxima=torch.ones(m) * 2)
    others |= dict(targets=targets.flip(0), controls=~targets.flip(0), batch=1)
    frontier(model, **given | {change: others[change]}, folder=tmp_path)
    assert len(list(tmp_path.glob("*/process-0.safetensors"))) == 2


def test_scores_of_auto_encoders_spliced_into_a_spliced_model_are_passes_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, sae, text = a_model(), {1: random_sae()}, corpus(100)
    scores = []
    for inner in random_sae(), random_sae():
        with splice(model, {1: inner}), splice(model, sae):
            scores.append([evaluate_sae(model, text, sae, folder=folder)[1].ce_clean for folder in (None, tmp_path)])
    assert scores[0][0] == scores[0][1] != scores[1][0] == scores[1][1]


def test_an_auto_encoder_without_weights_to_tell_is_refused_a_folder(tmp_path):
    class Scaled:
        def __init__(self, scale: float):
            self.scale, self.config = scale, random_sae().config

        def encode(self, x):
            return self.scale * x

        def decode(self, code):
            return code

    model, text = a_model(), corpus(100)
    losses = [evaluate_sae(model, text, {1: Scaled(scale)})[1].ce_spliced for scale in (0.5, 1.5)]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="Scaled has no state_dict: make it"):
        evaluate_sae(model, text, {1: Scaled(0.5)}, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_layers_counted_by_numpy_share_a_pass_with_those_counted_by_python(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, contexts, ones, sae = a_model(), torch.randint(0, 19, (5, 6)), torch.ones(1), random_sae()
    for layer in 1, np.int64(1):
        full_effect(model, contexts, layer, torch.tensor([3]), ones, folder=tmp_path)
        evaluate_sae(model, corpus(100), {layer: sae}, folder=tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_without_a_folder_nothing_is_hashed(monkeypatch):
    for module in fidelity, effects, cost, splicing, shared_pass:
        for name in {"digest_of_tensors", "sae_facts", "model_facts"} & set(vars(module)):
            monkeypatch.setattr(module, name, lambda *given: pytest.fail("hashed"))
    score(), steering()


def test_what_is_computed_under_autocast_is_a_pass_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, sae = a_model(), {1: random_sae()}
    kind, losses = model.token_embedding.weight.device.type, []
    for wanted in False, True:
        with torch.autocast(kind, torch.bfloat16, enabled=wanted):
            losses.append([evaluate_sae(model, corpus(100), sae, folder=each)[1].ce_clean for each in (None, tmp_path)])
    assert losses[0][0] == losses[0][1] != losses[1][0] == losses[1][1]


def test_texts_that_only_the_ends_of_documents_tell_apart_are_passes_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, sae, found = a_model(), {1: random_sae()}, []
    for cut in 50, 37:
        documents = np.repeat([0, 1], [cut, 100 - cut])
        text = TokenizedCorpus.from_arrays(np.arange(100) * 7 % 19, documents, ["a", "a"], 19)
        losses = [evaluate_sae(model, text, sae, folder=each)[1].ce_clean for each in (None, tmp_path)]
        means = [collect_records(model, text, 6, 1, folder=each).mean for each in (None, tmp_path)]
        assert losses[0] == losses[1] and means[0].equal(means[1])
        found.append((losses[0], means[0]))
    assert found[0][0] != found[1][0] and not found[0][1].equal(found[1][1])


def test_a_program_without_a_terminal_can_read(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    full_effect(a_model(), torch.randint(0, 19, (2, 4)), 1, torch.tensor([3]), torch.ones(1))


def test_a_batch_that_another_job_has_read_too_is_not_taken_for_one_that_is_missing(tmp_path):
    """As many tokens as there are, but the first batch twice and the second never."""
    with shared_pass.open_pass(RunningSums, 20, tmp_path, lambda: "text") as reading:
        reading.running.add(0, 10, {"sum": 1.0})
        write_tensors(reading.folder / "process-1.safetensors", reading.running.state_dict())
        with pytest.raises(ValueError, match="have read 20 tokens together, some of them twice, and not 20, each once"):
            reading.merged()
