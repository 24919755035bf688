import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest
import torch
from safetensors import SafetensorError
from test_training import corpus, new_model, recipe, stop_after, weights

import cratelab as cl
from cratelab import storage
from cratelab.corpora.tokenizers import WordEncoding, byte_encoding, fingerprint, load
from cratelab.losses import Diverged
from cratelab.run_directory import read_metrics
from cratelab.storage import locked
from cratelab.training import train

WORDS = WordEncoding([f"w{i}" for i in range(18)])


class Killed(BaseException):
    pass


def run(path, seed=0, on_step=None, **overrides):
    model = new_model(seed=seed)
    return model, train(model, corpus(), corpus(seed=1), recipe(**overrides), path, on_step, tokenizer=WORDS)


def same_weights(a, b) -> bool:
    return all(tensor.equal(weights(b)[name]) for name, tensor in weights(a).items())


def test_leaves_the_model_the_latest_checkpoints_and_where_it_comes_from(tmp_path):
    model, _ = run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-4", "checkpoint-6", "lock", "metrics.jsonl", "model", "run.json", "tokenizer.json",
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


@pytest.mark.parametrize("call", range(1, 41))
def test_a_kill_at_any_write_loses_nothing(tmp_path, monkeypatch, call):
    """The process ends at the n-th time that something is synced or renamed; a rename is followed by a sync."""
    whole, _ = run(None)
    calls = [0]

    def dying(act):
        def act_or_die(*arguments):
            calls[0] += 1
            if calls[0] == call:
                raise Killed
            return act(*arguments)

        return act_or_die

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(os, "fsync", dying(os.fsync))
        with suppress(Killed):
            run(tmp_path / "run")
        assert calls[0] == call or call > 35
        (tmp_path / "run" / "checkpoint-2.99-01234567.part").mkdir()  # of a process that could not clean up
    resumed, rows = run(tmp_path / "run")
    assert same_weights(whole, resumed) and len(rows) == 6
    assert same_weights(whole, cl.load(tmp_path / "run" / "model"))
    assert not list((tmp_path / "run").rglob("*.part"))


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
    save_file, path = storage.save_file, tmp_path / "run"

    def full(tensors, file, metadata):
        if "checkpoint-4" in str(file):
            raise SafetensorError("No space left on device")  # as it says it
        save_file(tensors, file, metadata)

    monkeypatch.setattr(storage, "save_file", full)
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
        train(new_model(cl.Gpt2), corpus(), corpus(seed=1), recipe(steps=2), tmp_path / "run", tokenizer=WORDS)
    with pytest.raises(ValueError, match=r"another training \(sha256 was "):
        train(new_model(), corpus(seed=2), corpus(seed=1), recipe(steps=2), tmp_path / "run", tokenizer=WORDS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(tmp_path / "mine")


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "checksums.json"]


def spoil(file, how):
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "half of it zeros":
        file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    elif how == "one bit":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        file.write_bytes({"cut": content[:50], "empty": b"", "foreign": b"null"}[how])


@pytest.mark.parametrize("how", ["removed", "half of it zeros", "one bit", "cut", "empty", "foreign"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_way_on_leads_to_the_same_bits(stopped_run, tmp_path, file, how):
    whole, stopped = stopped_run
    path = tmp_path / "run"
    shutil.copytree(stopped, path)
    spoil(path / "checkpoint-4" / file, how)
    with pytest.raises(
        ValueError, match=r"checkpoint-4.*remove (\S*checkpoint-4), .*goes on from checkpoint-2"
    ) as raised:
        run(path)
    assert file in str(raised.value) or (file, how) == ("checksums.json", "one bit")
    shutil.rmtree(path / "checkpoint-4")
    resumed, rows = run(path)
    assert same_weights(whole, resumed) and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """The model of a whole run, and the folder of one that was stopped after five of six steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Killed):
        run(folder, on_step=stop_after(5, Killed))
    return run(None)[0], folder


def test_without_another_checkpoint_the_way_on_is_to_begin_anew(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, on_step=stop_after(3, Killed))
    spoil(tmp_path / "checkpoint-2" / "model.safetensors", "cut")
    with pytest.raises(ValueError, match=r"remove .*checkpoint-2, then start the same run again: it begins anew"):
        run(tmp_path)


@pytest.mark.parametrize("lines", ["", "\0" * 80 + "\n", "{}\n" * 6, '{"step": 1}\n{"step": NaN}\n' * 3, "null\n" * 6])
def test_metrics_that_lack_steps_of_the_checkpoint_are_refused(stopped_run, tmp_path, lines):
    shutil.copytree(stopped_run[1], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"metrics.jsonl does not hold steps 1 to 4 .*; remove \S*checkpoint-4"):
        run(tmp_path / "run")


def test_lines_of_metrics_spoiled_after_the_checkpoint_are_written_anew(stopped_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stopped_run[1], path)
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:4]) + b"\0" * 50 + b"\n" + lines[4])
    resumed, rows = run(path)
    assert same_weights(stopped_run[0], resumed) and read_metrics(path) == rows


def test_what_the_program_did_not_write_stays_and_is_in_nobodys_way(stopped_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(stopped_run[1], path)
    shutil.copytree(path / "checkpoint-4", path / "checkpoint-best")
    shutil.copytree(path / "checkpoint-4", path / "checkpoint-5")  # a copy under another step's name
    shutil.copytree(path / "checkpoint-4", path / "checkpoint-007")
    (path / "checkpoint-notes.txt").write_text("good")
    (path / "checkpoint-7").write_text("a file")
    for name in "checkpoint-9", "checkpoint-²", "checkpoint-3.part":
        (path / name).mkdir()
        (path / name / "mine.txt").write_text("mine")
    (path / "checkpoint-2" / "mine.txt").write_text("mine")
    (path / "thesis.part").write_text("mine")
    ours = "metrics.jsonl", "run.json"
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name not in ours}
    resumed, _ = run(path)
    assert same_weights(stopped_run[0], resumed)
    gone = {str(file.relative_to(path)) for file, content in before.items() if not file.is_file()}
    assert gone == {f"checkpoint-2/{name}" for name in FILES}
    assert all(file.read_bytes() == content for file, content in before.items() if file.is_file())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_step_whose_name_is_taken_is_not_kept_and_the_run_goes_on(tmp_path, kind):
    with pytest.raises(Killed):
        run(tmp_path, on_step=stop_after(3, Killed))
    mine = tmp_path / "checkpoint-4"
    if kind == "folder":
        mine.mkdir()
        mine = mine / "mine.txt"
    mine.write_text("mine")
    with pytest.warns(UserWarning, match="checkpoint-4 is not this run's"):
        model, _ = run(tmp_path)
    assert same_weights(model, run(None)[0]) and mine.read_text() == "mine"
    assert {"checkpoint-2", "checkpoint-6"} <= {entry.name for entry in tmp_path.iterdir()}


def test_two_at_once_are_refused_and_a_reader_is_not(tmp_path):
    def look(row):
        if row["step"] == 3:
            with pytest.raises(BlockingIOError, match=f"another process is training in {tmp_path}: wait until"):
                run(tmp_path)
            assert len(read_metrics(tmp_path)) == 3 and cl.load(tmp_path / "checkpoint-2")
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_step=look)
    with locked(tmp_path / "lock", "it is free"):
        pass
    _, rows = run(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    with locked(tmp_path / "lock", "it is free"):
        pass


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("where", ["weight", "moment", "validation"])
def test_no_state_that_is_not_finite_replaces_a_good_one(tmp_path, monkeypatch, where, steps):
    """The last update goes wrong, or what comes after it; the loss before it was a good one."""
    step = torch.optim.AdamW.step
    calls = [0]

    def spoiled_step(self, *arguments):
        step(self, *arguments)
        calls[0] += 1
        if calls[0] == steps:
            parameter = self.param_groups[0]["params"][0]
            held = {"weight": parameter.data, "moment": self.state[parameter]["exp_avg_sq"]}
            held.get(where, torch.zeros(1))[0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled_step)
    if where == "validation":
        monkeypatch.setattr("cratelab.training.validation_loss", lambda *arguments: float("nan"))
    with pytest.raises(Diverged, match=f"step {steps}: .*" + ("checkpoint-2 is from before" if steps > 1 else "")):
        run(tmp_path, steps=steps, validate_every=steps)
    kept = [entry.name for entry in tmp_path.iterdir()]
    assert "model" not in kept and [name for name in kept if "checkpoint" in name] == ["checkpoint-2"][: steps // 2]
    assert len(read_metrics(tmp_path)) == steps - 1
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in cl.load(folder).state_dict().values())


def test_a_single_step_at_an_absurd_rate_is_no_result(tmp_path):
    with pytest.raises(Diverged, match="step 1"):
        run(tmp_path, steps=1, peak_rate=1e38, warmup=0)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("checkpoint-*"))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path):
    model = new_model()
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"numbers that are not finite, in norm.weight"):
        train(model, corpus(), corpus(seed=1), recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop", [1, 3, None])
def test_a_run_that_began_with_other_weights_is_not_gone_on_with(tmp_path, stop):
    with pytest.raises(Killed):
        run(tmp_path, on_step=stop_after(stop or 6, Killed))
    for other in new_model(seed=1), new_model():
        other.blocks[0].ista.weight.data[1, 1] += 0.01
        with pytest.raises(ValueError, match="a run that began with other weights"):
            train(other, corpus(), corpus(seed=1), recipe(), tmp_path, tokenizer=WORDS)
    nearly = new_model()  # as another CPU draws them
    nearly.token_embedding.weight.data.mul_(1 + 1e-7)
    train(nearly, corpus(), corpus(seed=1), recipe(), tmp_path, tokenizer=WORDS)
    assert same_weights(nearly, run(None)[0]) == (stop != 1)


def test_the_tokenizer_is_kept_and_another_is_refused(tmp_path):
    arguments = new_model(), corpus(), corpus(seed=1), recipe(steps=2), tmp_path
    train(*arguments, tokenizer=WORDS)
    assert fingerprint(load(tmp_path / "tokenizer.json")) == fingerprint(WORDS)
    assert json.loads((tmp_path / "run.json").read_text())["tokenizer"]["sha256"] == fingerprint(WORDS)
    other = WordEncoding([f"v{i}" for i in range(18)])
    with pytest.raises(ValueError, match=r"another tokenizer \(sha256 was .*or bring back the text"):
        train(new_model(), *arguments[1:], tokenizer=other)
    with pytest.raises(ValueError, match=r"corpus has 19 tokens, its tokenizer 4"):
        train(new_model(), *arguments[1:4], tmp_path / "new", tokenizer=WordEncoding(["a", "b", "c"]))
    train(new_model(), *arguments[1:4], tmp_path / "new", tokenizer=byte_encoding())


def test_corpora_of_two_tokenizers_are_refused(tmp_path):
    training, validation = corpus(), corpus(seed=1)
    training.manifest["tokenizer"], validation.manifest["tokenizer"] = {"sha256": "a" * 64}, {"sha256": "b" * 64}
    with pytest.raises(ValueError, match="aaaaaaaaaaaa…, bbbbbbbbbbbb…, unknown"):
        train(new_model(), training, validation, recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [[], 0, "text", [1]])
@pytest.mark.parametrize("part", ["model", "recipe", "training", "start"])
def test_an_odd_run_json_is_named(stopped_run, tmp_path, part, wrong):
    shutil.copytree(stopped_run[1], tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(about | {part: wrong}))
    with pytest.raises(ValueError, match=r"run.json "):
        run(tmp_path / "run")


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(ValueError, match="run is a file: choose another folder"):
        run(tmp_path / "run")


def test_a_finished_run_is_read_not_trained_again(tmp_path):
    model, rows = run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again, same = run(tmp_path / "run", on_step=lambda row: pytest.fail("it trained"))
    assert same == rows and same_weights(model, again)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name, value", [("loss", None), ("tokens", -7), ("validation_loss", "a"), ("loss", 2.0)])
def test_metrics_that_are_not_as_they_were_written_are_refused(stopped_run, tmp_path, name, value):
    path = shutil.copytree(stopped_run[1], tmp_path / "run")
    rows = read_metrics(path)
    rows[1][name] = value
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"metrics.jsonl does not hold steps 1 to . as they were written; remove"):
        run(path)


def test_a_caller_that_leaves_out_the_tokenizer_goes_on_from_the_same_checkpoint(stopped_run, tmp_path, recwarn):
    path = shutil.copytree(stopped_run[1], tmp_path / "run")
    before = read_metrics(path)
    train(new_model(seed=0), corpus(), corpus(seed=1), recipe(), path)
    assert read_metrics(path)[:4] == before[:4]
    assert not [each for each in recwarn if "is not this run's" in str(each.message)]


def test_an_interrupted_call_can_be_made_again_with_the_same_model(tmp_path):
    """As in a notebook, whose cell is stopped and run again."""
    whole, _ = run(None)

    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    model = new_model()
    for on_step in stop, None, None:  # stopped; goes on; is done already
        with suppress(KeyboardInterrupt):
            rows = train(model, corpus(), corpus(seed=1), recipe(), tmp_path / "run", on_step)
    assert same_weights(model, whole) and len(rows) == 6


def test_a_run_begun_without_its_tokenizer_goes_on_with_it(tmp_path):
    words = WordEncoding([f"w{i}" for i in range(18)])
    train(new_model(), corpus(), corpus(seed=1), recipe(), tmp_path / "run")
    rows = train(new_model(), corpus(), corpus(seed=1), recipe(), tmp_path / "run", tokenizer=words)
    assert len(rows) == 6 and (tmp_path / "run" / "tokenizer.json").is_file()
