import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from test_training import corpus, new_model, recipe, weights

import cratelab as cl
from cratelab import run_directory
from cratelab.run_directory import read_metrics
from cratelab.training import train


class Killed(BaseException):
    pass


def run(path, seed=0, on_step=None, **overrides):
    model = new_model(seed=seed)
    return model, train(model, corpus(), corpus(seed=1), recipe(**overrides), path, on_step)


def same_weights(a, b) -> bool:
    return all(tensor.equal(weights(b)[name]) for name, tensor in weights(a).items())


def test_leaves_the_model_the_latest_checkpoint_and_where_it_comes_from(tmp_path):
    model, _ = run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-6", "metrics.jsonl", "model", "run.json",
    ]  # fmt: skip
    assert same_weights(model, cl.load(tmp_path / "run" / "model"))
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["model"]["model"] == "Crate" and about["recipe"]["steps"] == 6
    assert about["training"] == corpus().facts() != about["validation"] == corpus(seed=1).facts()
    assert about["provenance"]["processes"] == 1


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_goes_on_to_the_same_bits_after_a_stop_at_any_step(tmp_path, stop_at):
    whole, rows = run(None)

    def stop(row):
        if row["step"] == stop_at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", on_step=stop)
    resumed, again = run(tmp_path / "run")
    assert same_weights(whole, resumed)
    timeless = [[{**row, "seconds": 0} for row in each] for each in (rows, again, read_metrics(tmp_path / "run"))]
    assert timeless[0] == timeless[1] == timeless[2]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, 14))
def test_a_kill_at_any_write_loses_nothing(tmp_path, monkeypatch, call, after):
    """The process ends at the n-th time that a file or folder gets its name, before it does, or just after."""
    whole, _ = run(None)
    calls, replace = [0], os.replace

    def dying_replace(source, target):
        calls[0] += 1
        if calls[0] == call:
            if after:
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying_replace)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    resumed, rows = run(tmp_path / "run")
    assert same_weights(whole, resumed) and len(rows) == 6
    assert same_weights(whole, cl.load(tmp_path / "run" / "model"))
    assert not list((tmp_path / "run").glob("*.part"))


SCRIPT = """
    import sys, torch
    sys.path[:0] = {paths!r}
    torch.set_num_threads(1)
    from test_training import corpus, new_model, recipe
    from cratelab.training import train
    train(new_model(), corpus(), corpus(seed=1), recipe(steps=100, checkpoint_every=7, validate_every=50), sys.argv[1])
"""


def start(path, errors=subprocess.DEVNULL, **options) -> subprocess.Popen:
    script = textwrap.dedent(SCRIPT).format(paths=[os.path.dirname(__file__)])
    return subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=errors, text=True, **options)


def long_run(path=None) -> cl.LanguageModel:
    model = new_model()
    train(model, corpus(), corpus(seed=1), recipe(steps=100, checkpoint_every=7, validate_every=50), path)
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised on the CPU")
def test_sigkill_at_random_moments_ends_in_the_same_bits(tmp_path):
    path, kills = tmp_path / "run", 0
    for _ in range(2):
        process, seen = start(path), len(read_metrics(path))
        while process.poll() is None and len(read_metrics(path)) <= seen:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    resumed = long_run(path)
    assert same_weights(long_run(), resumed) and same_weights(resumed, cl.load(path / "model"))
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 101))


def test_a_disk_that_fills_up_keeps_the_checkpoint_and_says_so(tmp_path):
    """A limit on the size of files stands in for the disk: the optimiser's file is the first that is too large."""
    run(tmp_path / "run", steps=2)
    size = (tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors").stat().st_size
    path = tmp_path / "small"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, size - 100))

    process = start(path, errors=subprocess.PIPE, preexec_fn=limit)
    _, message = process.communicate()
    assert process.returncode
    assert "cannot be written" in message and "no state was kept yet" in message and "Make room" in message
    assert not list(path.glob("checkpoint-*"))
    assert same_weights(long_run(), long_run(path))  # with room it goes on


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path, monkeypatch):
    save_file, path = run_directory.save_file, tmp_path / "run"

    def full(tensors, file):
        if "checkpoint-4" in str(file):
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr(run_directory, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device; the state after step 2 is safe. Make room"):
        run(path)
    assert sorted(entry.name for entry in path.glob("checkpoint*")) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed, _ = run(path)
    assert same_weights(run(None)[0], resumed)


def test_metrics_after_the_checkpoint_and_a_cut_line_are_written_again(tmp_path):
    def stop(row):
        if row["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", on_step=stop)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert len(read_metrics(tmp_path / "run")) == 5
    run(tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_another_run_or_other_files_are_not_touched(tmp_path):
    run(tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match=r"holds a run with another recipe \(steps was 2, now 3\): choose another"):
        run(tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match=r"another model \(model was Crate, now Gpt2"):
        train(new_model(cl.Gpt2), corpus(), corpus(seed=1), recipe(steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match=r"another training \(sha256 was "):
        train(new_model(), corpus(seed=2), corpus(seed=1), recipe(steps=2), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(tmp_path / "mine")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    def stop(row):
        if row["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", on_step=stop)
    damaged = tmp_path / "run" / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"checkpoint-2/{file} cannot be read"):
        run(tmp_path / "run")


def test_a_finished_run_is_read_not_trained_again(tmp_path):
    model, rows = run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again, same = run(tmp_path / "run", on_step=lambda row: pytest.fail("it trained"))
    assert same == rows and same_weights(model, again)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
