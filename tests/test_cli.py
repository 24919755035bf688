import json
import os
import re
import subprocess
import sys

import pytest
import torch

import cratelab as cl
from cratelab.cli import main
from cratelab.corpora.prepare import prepare
from cratelab.run_directory import read_metrics
from cratelab.steering import neuron_maxima

SHORT = ["--steps", "4", "--batch", "4", "--characters", "100000", "--context", "96", "--validate-every", "2"]


def test_trains_on_tinyworld_and_leaves_model_curve_and_command(tmp_path, capsys):
    main(["train", "--run-dir", str(tmp_path / "run"), "--seed", "3", *SHORT])
    printed = capsys.readouterr().out
    assert "crate toy, 88,832 parameters" in printed and "the floor is 0." in printed
    assert isinstance(cl.load(tmp_path / "run" / "model"), cl.Crate)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert command["seed"] == 3 and command["corpus"] == "tinyworld"


def test_resume_goes_on_with_the_options_of_the_run(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["train", "--model", "gpt2", "--checkpoint-every", "1", *SHORT]
    main([*options, "--run-dir", str(whole)])

    class Killed(BaseException):
        pass

    def stop(row):
        if row["step"] == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("cratelab.cli._report", stop)
        with pytest.raises(Killed):
            main([*options, "--run-dir", str(cut)])
    assert len(read_metrics(cut)) == 2
    main(["train", "--resume", str(cut)])
    assert (cut / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def write_text(folder, letters):
    """Documents of two-letter words, from which another tokenizer is learnt for other letters."""
    words = [a + b for a in letters for b in letters]
    folder.mkdir(exist_ok=True)
    for split, first in ("train", 0), ("validation", 20):
        documents = [" ".join(words[(i * j) % len(words)] for j in range(60)) for i in range(first, first + 20)]
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def test_a_run_whose_text_has_changed_is_refused_where_its_tokens_are_others(tmp_path, monkeypatch, capsys):
    text, run = tmp_path / "text", str(tmp_path / "run")
    write_text(text, "abcdef")
    for corpus in "first", "second":  # a cache each
        monkeypatch.setenv("CRATELAB_CACHE", str(tmp_path / corpus))
        if corpus == "first":
            options = [
                "--corpus",
                str(text),
                "--tokenizer",
                "bpe-270",
                "--context",
                "16",
                "--steps",
                "3",
                "--batch",
                "2",
            ]
            main(["train", "--run-dir", run, *options])
            main(["steer", run, "--n-new", "2", "--n-tokens", "64"])
            write_text(text, "uvwxyz")
    for command in ["steer", run], ["interpret", run], ["interpret", run, "--corpus", str(text)]:
        with pytest.raises(
            SystemExit, match=r"trained on other tokens \(\S*, 270 of them\) .*, 270\).*run/tokenizer.json"
        ):
            main([*command, *(["--tokenizer", "bpe-270"] if "--corpus" in command else [])])
    with pytest.raises(SystemExit, match=r"a run with another tokenizer \(sha256 was .*bring back the text"):
        main(["train", "--resume", run])
    write_text(text, "abcdef")
    monkeypatch.setenv("CRATELAB_CACHE", str(tmp_path / "third"))
    main(["steer", run, "--n-new", "2", "--n-tokens", "64"])


def test_another_corpus_is_read_with_the_tokenizer_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATELAB_CACHE", str(tmp_path / "cache"))
    for name, letters in ("a", "abcdef"), ("b", "uvwxyz"):
        write_text(tmp_path / f"{name}", letters)
    run, options = str(tmp_path / "run"), ["--context", "96", "--steps", "2", "--batch", "2", "--tokenizer", "bytes"]
    main(["train", "--run-dir", run, "--corpus", str(tmp_path / "a"), *options])
    main(["steer", run, "--corpus", str(tmp_path / "b"), "--n-new", "2", "--n-tokens", "64"])
    with pytest.raises(SystemExit, match=r"trained on other tokens \(bytes, 257 of them\)"):
        main(["steer", run, "--corpus", "tinyworld", "--n-new", "2"])
    main(["steer", f"{run}/model", "--corpus", str(tmp_path / "b"), "--tokenizer", "bytes", "--n-new", "2"])


def test_a_run_without_a_model_says_what_it_is(tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="the same command goes on"):
        patched.setattr("cratelab.cli._report", stop)
        main(["train", "--run-dir", str(tmp_path / "run"), *SHORT])
    with pytest.raises(SystemExit, match=r"has not ended, and no model yet: go on with cratelab train --resume"):
        main(["interpret", str(tmp_path / "run")])
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "run.json").write_text('{"sae": {}, "recipe": {}}')
    with pytest.raises(SystemExit, match="a run of another kind"):
        main(["steer", str(tmp_path / "sae")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "many"},
        {"preset": "huge"},
        {"more": 1},
        {"corpus": None},
        {"seed": True},
        {"compile": 1},
        {"batch": [1]},
    ],
    ids=str,
)
def test_an_odd_command_in_a_run_is_named(tmp_path, wrong):
    command = {"corpus": "tinyworld", "preset": "toy", "seed": 0} | wrong
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    with pytest.raises(SystemExit, match=rf"run.json is damaged: .*{next(iter(wrong))}"):
        main(["train", "--resume", str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"command": [wrong]}))
    with pytest.raises(SystemExit, match=r"run.json is damaged: command may hold .*corpus"):
        main(["train", "--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--seed", str(2**32)], "a seed must be at least 0 and below 2**32"),
        (["train", "--seed", "-1"], "seed must be at least 0; got -1"),
        (["train", "--context", "0"], "context must be at least 1; got 0"),
        (["train", "--context", str(10**11)], "memory does not hold CrateConfig"),
        (
            ["train", "--dry-run", "--accumulate", "3"],
            "the batch must be a multiple of processes × accumulate; got 16, 1",
        ),
        (["train", "--peak-rate", "nan"], "peak_rate must be at least 0; got nan"),
        (["compare", "--seeds", "0"], "seeds must be one or more, each once; got []"),
        (["compare", "--seeds", "-2"], "seeds must be one or more, each once; got []"),
        (["compare", "--presets", "toy", "toy"], "presets must be one or more, each once; got ['toy', 'toy']"),
        (["compare", "--context", "0"], "context must be at least 1; got 0"),
        (["reproduce", "reference", "--seeds", "0"], "seeds must be one or more"),
        (["reproduce", "reference", "--steps", "0"], "steps must be at least 1; got 0"),
        (["reproduce", "chapter-9", "--steps", "0"], "steps must be at least 2"),
        (["reproduce", "chapter-9", "--steps", "2"], "steps must be at least 3"),
    ],
)
def test_what_is_out_of_range_is_refused_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cratelab.cli.prepare", lambda *options: pytest.fail("a corpus was made"))
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cratelab.budget.measure_matmul_rate", lambda device: 1e12)
    main(["train", "--preset", "B", "--dry-run"])
    assert "parameters    43,694,592" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_compare_prints_a_table_with_intervals_and_goes_on(tmp_path, capsys):
    main(["compare", "--seeds", "2", "--out", str(tmp_path), *SHORT])
    printed = capsys.readouterr().out
    assert "crate   toy" in printed and "gpt2    toy" in printed and "±" in printed and "no model can do" in printed
    held = json.loads((tmp_path / "compare.json").read_text())
    assert [row["seeds"] for row in held["table"]] == [2, 2] and held["provenance"]["cratelab"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_interpret_scores_a_run_beside_an_untrained_model(tmp_path, capsys):
    main(["train", "--run-dir", str(tmp_path / "run"), *SHORT, "--steps", "30"])
    main(["interpret", str(tmp_path / "run"), "--n-tokens", "2000", "--protocols", "top-and-random"])
    held = json.loads((tmp_path / "run" / "interpret.json").read_text())
    assert held["provenance"]["corpus"] == json.loads((tmp_path / "run" / "run.json").read_text())["validation"]
    rows = held["rows"]
    assert [(row["model"], row["explainer"]) for row in rows] == [
        (model, explainer) for model in ("trained", "untrained") for explainer in ("token", "suffix", "concept")
    ]
    assert all(len(row["layers"]) == 2 and row["interval"][0] <= row["mean"] <= row["interval"][1] for row in rows)
    assert "untrained top-and-random  concept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no run, so nothing says what it has read: give --corpus"):
        main(["interpret", str(tmp_path / "run" / "model")])


def test_steer_shows_what_a_neuron_raises_and_a_text_with_and_without_it(tmp_path, capsys):
    main(["train", "--run-dir", str(tmp_path), *SHORT, "--steps", "30"])
    model, text = cl.load(tmp_path / "model"), prepare("tinyworld", characters=500_000, context=96)
    capsys.readouterr()
    main(["steer", str(tmp_path), "--n-new", "6", "--temperature", "0"])
    printed = capsys.readouterr().out.splitlines()
    layer, neuron, maximum, value = re.fullmatch(
        r"layer (\d+), neuron (\d+), at most ([\d.]+) in 4096 tokens, set to ([\d.]+)", printed[0]
    ).groups()
    layer, neuron = int(layer), int(neuron)
    raised = (model.blocks[1].ista.D.mT - model.blocks[1].ista.D.mean(0)[:, None]) * model.norm.weight
    raised = (raised @ model.token_embedding.weight.mT)[:, : text.validation.n_vocab].topk(10)
    reach = raised.values.mean(1) * neuron_maxima(model, text.validation, 4096)[1]
    assert layer == 1 and neuron == int(reach.argmax()) and float(value) == pytest.approx(2 * float(maximum), abs=0.02)
    rows = [re.findall(r"'(\S+)' ([+-][\d.]+)", line) for line in printed[3:13]]
    assert [row[0][0] for row in rows] == [text.tokenizer.decode([i]) for i in raised.indices[neuron].tolist()]
    assert all(float(row[0][1]) > 0 > float(row[2][1]) and float(row[1][1]) > float(row[3][1]) for row in rows)
    prompt = torch.from_numpy(text.validation[:12].astype("int64"))[None]
    (without,) = model.generate(prompt, 6, temperature=0).tolist()
    assert printed[15] == f"without: {text.tokenizer.decode(without)}" and printed[16].startswith("with: <begin>")
    main(
        [
            "steer",
            str(tmp_path),
            "--neuron",
            "3",
            "--by",
            "scale",
            "--value",
            "1",
            "--prompt",
            "the dog",
            "--n-new",
            "4",
        ]
    )
    *_, without, steered = capsys.readouterr().out.splitlines()
    assert without.removeprefix("without: ") == steered.removeprefix("with: ") and "the dog" in steered
    for wrong, message in [
        (["--layer", "2"], "--layer must be 0 to 1; got 2"),
        (["--neuron", "256"], "layer 1 has neurons 0 to 255"),
        (["--prompt", "xylophone"], "1 words are not among"),
        (["--prompt", ""], "--prompt has no token"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["steer", str(tmp_path), *wrong])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--corpus", "shakespeare"], "cratelab: no corpus 'shakespeare': give tinyworld"),
        (["train", "--steps", "0"], "cratelab: steps must be at least 1; got 0"),
        (["train", "--resume", "/nowhere"], "cratelab: /nowhere holds no run"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value).startswith(message)


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    train = ["-m", "cratelab", "train", "--precision", "no", *SHORT, "--checkpoint-every", "2", "--run-dir"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    for command in [*train, str(tmp_path / "one")], [*launch, *train, str(tmp_path / "two")]:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "run.json").read_text())["provenance"]["processes"] == 2
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("validation_loss") == pytest.approx(b.get("validation_loss"), abs=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    alone, together = (cl.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    apart = sum(float((alone[name] - together[name]).square().sum()) for name in alone) ** 0.5
    assert apart < 1e-3 * sum(float(tensor.square().sum()) for tensor in alone.values()) ** 0.5
