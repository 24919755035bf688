import ast
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_crate import official_weights

import cratelab as cl
from cratelab.cli import COMMANDS, main
from cratelab.cli.options import Layerwise
from cratelab.cli.runs import load_run
from cratelab.cli.shared import print_table
from cratelab.corpora.prepare import prepare
from cratelab.corpora.tokenizers import byte_encoding, save
from cratelab.devices import CHOSEN, best_device
from cratelab.interpret.asking.prompts import EXAMPLE
from cratelab.interpret.language_models import ECHO
from cratelab.run_directory import read_metrics
from cratelab.steering import neuron_maxima

SHORT = ["--steps", "4", "--batch", "4", "--characters", "100000", "--context", "96", "--validate-every", "2"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TINY = ["--steps", "1", "--batch", "2", "--characters", "60000", "--context", "65"]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of one step, whose model is then replaced by a smaller one."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(
        ["train", "--run-dir", str(folder), "--steps", "1", "--batch", "2", "--characters", "60000", "--context", "65"]
    )
    vocabulary = cl.load(folder / "model").config.vocab_size
    model = cl.Crate(cl.CrateConfig(n_layers=2, n_heads=2, width=8, vocab_size=vocabulary, context=65))
    model.save(folder / "model")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to spoil."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def shell(command: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    """Run a line of shell in which `cratelab` is the command, with nothing from the environment but what is given."""
    given = environment | {"PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = f'cratelab() {{ "{sys.executable}" -m cratelab "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", command], cwd=folder, env=given, capture_output=True, timeout=300)


def fails(arguments: list[str], *messages: str) -> None:
    """`cratelab` with these arguments ends with status 1 and a message with all of these in it."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, str), "a message makes Python's exit status 1"
    assert stopped.value.code.startswith("cratelab: ")
    for message in messages:
        assert message in stopped.value.code


def test_trains_on_tinyworld_and_leaves_model_curve_and_command(tmp_path, capsys):
    main(["train", "--run-dir", str(tmp_path / "run"), "--seed", "3", *SHORT])
    printed = capsys.readouterr().out
    assert "crate toy, 88,832 parameters" in printed and "the floor is 0." in printed
    assert isinstance(cl.load(tmp_path / "run" / "model"), cl.Crate)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert command["seed"] == 3 and command["corpus"] == "tinyworld"


def test_resume_goes_on_with_the_options_of_the_run(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["train", "--model", "gpt2", "--checkpoint-every", "1", *SHORT]
    main([*options, "--run-dir", str(whole)])
    assert "steps are done" not in capsys.readouterr().out

    class Killed(BaseException):
        pass

    def stop(row):
        if row["step"] == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("cratelab.cli.train.report", stop)
        with pytest.raises(Killed):
            main([*options, "--run-dir", str(cut)])
    assert len(read_metrics(cut)) == 2
    main(["train", "--resume", str(cut)])
    assert "steps are done" not in capsys.readouterr().out
    main(["train", "--resume", str(cut)])
    said = f"its 4 steps are done, and {cut / 'model'} holds the model; to train longer, begin another run"
    assert said in capsys.readouterr().out
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
    main(["train", "--run-dir", f"{run}-bpe", "--corpus", str(tmp_path / "a"), *options[:-1], "bpe-270"])
    main(["steer", f"{run}-bpe", "--corpus", str(tmp_path / "b"), "--n-new", "2", "--n-tokens", "64"])


def test_a_run_without_a_model_says_what_it_is(tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr("cratelab.cli.train.report", stop)
        main(["train", "--run-dir", str(tmp_path / "run"), *SHORT])
    with pytest.raises(SystemExit, match=r"has not ended, and no model yet: go on with cratelab train --resume"):
        main(["interpret", str(tmp_path / "run")])
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "run.json").write_text('{"sae": {}, "recipe": {}}')
    with pytest.raises(SystemExit, match="a run of another kind"):
        main(["steer", str(tmp_path / "sae")])


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


def test_interpret_scores_a_run_beside_an_untrained_model(copy, capsys):
    main(["interpret", str(copy), "--n-tokens", "2000", "--protocols", "top-and-random"])
    held = json.loads((copy / "interpret.json").read_text())
    assert held["provenance"]["corpus"] == json.loads((copy / "run.json").read_text())["validation"]
    rows = held["rows"]
    assert [(row["model"], row["explainer"]) for row in rows] == [
        (model, explainer) for model in ("trained", "untrained") for explainer in ("token", "suffix", "concept")
    ]
    assert all(len(row["layers"]) == 2 and row["interval"][0] <= row["mean"] <= row["interval"][1] for row in rows)
    assert "untrained top-and-random  concept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no run, so nothing says what it has read: give --corpus"):
        main(["interpret", str(copy / "model")])


class Oracle:
    """A language model that is always of the same opinion."""

    name, concurrency, all_at_once, continues, asked = "oracle", 1, True, True, 0
    made: ClassVar = []

    def __init__(self, url, model, chat, echo):
        self.made.append((url, model, chat, echo))

    def answer(self, request):
        type(self).asked += 1
        if not request.top:
            return {"text": f"sentence {self.asked}"}
        return {"next": [[[str(i * len(request.text) % 7), 0.0]] for i, _ in enumerate(request.prompt)]}

    def count_tokens(self, text):
        return len(text) // 4


def test_interpret_asks_a_language_model_about_the_neurons_that_the_rules_explain(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cratelab.cli.interpret.OpenAIEndpoint", Oracle)
    out, url = tmp_path / "scores.json", "http://user:pass-word@127.0.0.1:9/v1"
    options = ["interpret", str(run), "--n-tokens", "2000", "--protocols", "random-only", "--out", str(out)]
    options += ["--explainer", "token", "language-model", "--endpoint", url]
    options += ["--language-model", "tiny", "--neurons", "3"]
    main([*options, "--dry-run"])
    dry = capsys.readouterr().out.splitlines()
    assert [line.partition(" requests")[0].partition(": at most ")[0] for line in dry] == ["trained", "untrained"]
    assert Oracle.asked == 0 and not out.exists()
    assert Oracle.made == [(url, "tiny", True, False)]  # whether the server repeats prompts is not tried either
    main(options)
    cost, header, *lines = capsys.readouterr().out.splitlines()
    assert cost == dry[0] and int(cost.split()[3]) > 6 and "explainer" in header
    held = json.loads(out.read_text())
    rows = held["rows"]
    assert [(row["model"], row["explainer"]) for row in rows] == [
        (model, name) for model in ("trained", "untrained") for name in ("token", "language-model")
    ]
    assert len({len(line) for line in (header, *lines[:2])}) == 1 and lines[1].startswith(
        "trained   random-only     language"
    )
    assert all(len(row["layers"]) == 2 and row["coverage"] <= 1 for row in rows)
    assert len(rows[1]["texts"]) == 6 and any(text.startswith("sentence") for text in rows[1]["texts"] if text)
    assert [len(set(layer)) for layer in held["neurons"]] == [3, 3]
    assert "pass-word" not in out.read_text() and held["provenance"]["options"]["endpoint"] == "http://127.0.0.1:9/v1"
    assert rows[1]["reasons"] == [None if text else "never active in its excerpts" for text in rows[1]["texts"]]
    asked = Oracle.asked
    capsys.readouterr()
    main([*options, "--dry-run"])  # what is kept is known to be, explanations, simulations and controls
    assert all(": at most 0 requests" in line for line in capsys.readouterr().out.splitlines())
    Oracle.made.pop()
    main([*options, "--completions"])
    assert Oracle.made[1:] == [(url, "tiny", True, True), (url, "tiny", False, True)]
    assert Oracle.asked == asked and (tmp_path / "scores.answers.sqlite").is_file()
    assert json.loads(out.read_text())["rows"] == rows


@pytest.mark.parametrize("share", [1, 2])
def test_neurons_that_got_no_sentence_are_counted_and_none_at_all_is_an_error(
    share, run, tmp_path, monkeypatch, capsys
):
    """Of every `share` questions one is answered by what is no answer."""

    class Garbled(Oracle):
        asked = 0

        def answer(self, request):
            answer = super().answer(request)
            return {"problem": "not JSON"} if "text" in answer and self.asked % share == 0 else answer

    monkeypatch.setattr("cratelab.cli.interpret.OpenAIEndpoint", Garbled)
    options = ["interpret", str(run), "--n-tokens", "2000", "--protocols", "random-only", "--neurons", "3"]
    options += ["--explainer", "language-model", "--endpoint", "http://127.0.0.1:9/v1", "--language-model", "tiny"]
    out = tmp_path / "scores.json"
    if share == 1:
        fails([*options, "--out", str(out)], "neurons have no explanation: not JSON (", "Does the endpoint answer")
        assert not out.exists() and "explainer" not in capsys.readouterr().out
        return
    main([*options, "--out", str(out)])
    assert " of 6 neurons have no explanation: not JSON (" in capsys.readouterr().out
    assert "not JSON" in json.loads(out.read_text())["rows"][0]["reasons"]


def test_places_without_a_number_and_neurons_given_the_prompts_example_stand_in_the_table(
    run, tmp_path, monkeypatch, capsys
):
    """Of two places one has no number; neurons without a sentence have no place, and do not count."""

    class Parrot(Oracle):
        asked = 0

        def answer(self, request):
            answer = super().answer(request)
            if "text" in answer:
                return {"text": f"{EXAMPLE}."} if self.asked % 2 else answer
            return {"next": [place if i % 2 else [[" the", 0.0]] for i, place in enumerate(answer["next"])]}

    monkeypatch.setattr("cratelab.cli.interpret.OpenAIEndpoint", Parrot)
    options = ["interpret", str(run), "--n-tokens", "2000", "--protocols", "random-only", "--neurons", "3"]
    options += ["--endpoint", "http://127.0.0.1:9/v1", "--language-model", "tiny", "--explainer", "language-model"]
    main([*options, "token", "--out", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "protocol" in line or "random-only" in line]
    asked, by_rule = json.loads((tmp_path / "scores.json").read_text())["rows"][:2]
    assert f"{asked['reasons'].count(ECHO)} of 6 neurons have no explanation: {ECHO}" in printed
    assert 0.5 <= asked["no_number"] < 0.52 and asked["coverage"] < 0.4
    assert lines[0].endswith("  no number") and lines[1].endswith(f"{asked['no_number']:11.0%}")
    assert "no_number" not in by_rule and lines[2].endswith(f"{by_rule['undefined']:11.0%}{'':11}")


def test_a_gguf_file_is_asked_from_the_command_line(run, packed, tmp_path, capsys):
    """The random judge of 16 dimensions says nothing of worth; with a context of 20,000 it can read the prompts."""
    gguf, judge = pytest.importorskip("gguf"), tmp_path / "judge.gguf"
    judge.write_bytes(packed.read_bytes())
    (length,) = gguf.GGUFReader(judge, "r+").fields["llama.context_length"].parts[-1:]
    length[0] = 20_000
    length.base.flush()
    options = ["interpret", str(run), "--n-tokens", "2000", "--protocols", "random-only", "--neurons", "2"]
    options += ["--explainer", "language-model", "--endpoint", str(judge), "--out", str(tmp_path / "scores.json")]
    main(options)
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["no_number"] for row in rows] == [0, 0] and any(rows[0]["texts"])
    assert capsys.readouterr().out.count(" 0%\n") == 2
    options[-1] = str(tmp_path / "shared.json")  # two processes, each with a judge, answer half of the questions
    assert started(2, *options).count(" 0%\n") == 2
    assert json.loads((tmp_path / "shared.json").read_text())["rows"] == rows
    with pytest.raises(SystemExit, match="are for a server, and --endpoint is a folder or a file"):
        main([*options, "--completions"])


def test_rules_score_drawn_neurons_as_among_all(run, tmp_path):
    options = ["interpret", str(run), "--n-tokens", "2000", "--protocols", "random-only", "--explainer", "token"]
    main([*options, "--neurons", "32", "--out", str(tmp_path / "drawn.json")])
    main([*options, "--out", str(tmp_path / "all.json")])
    drawn, every = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("drawn", "all"))
    assert drawn["rows"] == every["rows"] and drawn["neurons"] == [list(range(32))] * 2 and "neurons" not in every


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


def started(processes: int, *arguments: str) -> str:
    """What `cratelab` with these arguments prints when so many processes are started."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0", "--standalone"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "cratelab", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one_with_the_same_global_batch_and_one_speaks(tmp_path):
    options = ["train", "--precision", "no", *SHORT, "--checkpoint-every", "2", "--run-dir"]
    printed = [started(n, *options, str(tmp_path / name)) for n, name in ((1, "one"), (2, "two"))]
    words = [re.sub(r"\d+\.\d+", "#", text) for text in printed]
    assert words[0].replace(str(tmp_path / "one"), str(tmp_path / "two")) == words[1]
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
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    main([*options, str(tmp_path / "two")])
    assert json.loads((tmp_path / "two" / "run.json").read_text())["went_on"] == [{"step": 2, "processes": 1}]


def test_processes_share_the_reading_of_interpret_and_one_scores_and_writes(copy, tmp_path):
    options = ["interpret", str(copy), "--n-tokens", "2000", "--protocols", "top-and-random", "--out"]
    printed = [started(n, *options, str(tmp_path / f"{n}.json")) for n in (1, 3)]
    assert printed[0].replace("1.json", "3.json") == printed[1] and printed[0].count("untrained") == 3
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["rows"] for n in (1, 3)]
    assert rows[0] == rows[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "3.json", "run"]
    assert started(2, "steer", str(copy), "--n-new", "3").count("without: ") == 1


def test_what_is_work_for_one_process_is_refused_to_several_and_errors_have_their_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, name in ("0", "cratelab"), ("1", "cratelab, process 1"):
        monkeypatch.setenv("RANK", rank)
        for command in ["reproduce", "rates"], ["export", "run", "--to", "out"]:
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code.startswith(f"{name}: {command[0]} is work for one process")
        main(["train", "--dry-run"])
        assert bool(capsys.readouterr().out) == (rank == "0")


def never(*arguments, **options):
    raise AssertionError("work has begun before the options were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --context 0", "--context must be at least 1"),
        ("train --context 100000000000", "--context must be at most four times --characters"),
        ("train --characters 0", "--characters must be at least 1"),
        ("train --characters -3", "--characters must be at least 1"),
        ("train --steps 0", "steps must be at least 1; got 0"),
        ("train --steps -1", "steps must be at least 1; got -1"),
        ("train --batch 0", "batch must be at least 1; got 0"),
        ("train --batch 4 --accumulate 3", "the batch must be a multiple of processes × accumulate; got 4, 1 and 3"),
        ("train --dry-run --accumulate 3", "the batch must be a multiple of processes × accumulate; got 16, 1 and 3"),
        ("train --peak-rate nan", "peak_rate must be at least 0"),
        ("train --seed -1", "--seed must be at least 0 and at most 4294967295; got -1"),
        ("train --seed 4294967296", "--seed must be at least 0 and at most 4294967295; got 4294967296"),
        ("train --corpus shakespeare", "no corpus 'shakespeare'"),
        ("train --corpus pydocs --tokenizer bpe", "bpe-4096; got 'bpe'"),
        ("train --run-dir FILE", "--run-dir must be a folder"),
        ("train --run-dir FILE/run", "nothing can be written into"),
        ("train --run-dir /proc/run", "--run-dir: nothing can be written into /proc"),
        ("train --run-dir OTHER", "is not empty and holds no run"),
        ("train --resume RUN --steps 7 --corpus pydocs", "--resume takes all options from the run: leave out --"),
        ("train --resume FILE", "holds no run"),
        ("train --resume missing", "missing holds no run: there is no run.json in it; it does not exist"),
        ("train --resume OTHER", "it holds runs: give one of them, such as"),
        ("compare --seeds 0", "--seeds must be at least 1"),
        ("compare --seeds -1", "--seeds must be at least 1"),
        ("compare --presets toy toy", "presets must be one or more, each once; got ['toy', 'toy']"),
        ("compare --presets", "presets must be one or more, each once; got []"),
        ("compare --context 0", "--context must be at least 1"),
        ("compare --context 100000000000", "--context must be at most"),
        ("compare --out FILE", "--out must be a folder"),
        ("compare --out /proc/comparison", "--out: nothing can be written into /proc"),
        ("reproduce reference --seeds 0", "--seeds must be at least 1"),
        ("reproduce reference --steps 0", "--steps must be at least 1"),
        ("reproduce chapter-9 --steps 0", "--steps must be at least 1"),
        ("reproduce chapter-9 --text OTHER", "--text is for reference"),
        ("reproduce chapter-9 --out FILE", "--out must be a folder"),
        ("interpret RUN --n-tokens -5", "--n-tokens must be at least 1"),
        ("layerwise RUN --eps 0", "--eps must be at least 1e-6"),
        ("layerwise RUN --n-tokens 0", "--n-tokens must be at least 1"),
        ("interpret RUN --n-tokens 0", "--n-tokens must be at least 1"),
        ("interpret RUN --protocols", "--protocols must name at least one"),
        ("interpret RUN --protocols random-only random-only", "and none twice"),
        ("interpret RUN --seed 4294967296", "--seed must be at least 0"),
        ("interpret RUN --out OTHER", "--out must be a file to write"),
        ("interpret RUN --out FILE/scores.json", "--out: nothing can be written into"),
        ("interpret RUN --out /proc/scores.json", "--out: nothing can be written into /proc"),
        ("interpret RUN --explainer token token", "--explainer must name at least one, and none twice"),
        ("interpret RUN --neurons 1", "--neurons must be at least 2"),
        ("interpret RUN --neurons 33", "--neurons must be at most 32, a layer's; got 33"),
        ("interpret RUN --endpoint FILE", "--endpoint: only with --explainer language-model"),
        ("interpret RUN --dry-run --cache FILE", "--cache, --dry-run: only with --explainer language-model"),
        ("interpret RUN --explainer language-model", "needs --endpoint"),
        ("interpret RUN --explainer language-model --endpoint http://localhost/v1", "say by --language-model which"),
        ("interpret RUN --explainer language-model --endpoint FILE", "--endpoint: file is no folder, no .gguf file"),
        ("interpret RUN --explainer language-model --endpoint OTHER --language-model x", "are for a server"),
        ("interpret RUN --explainer language-model --endpoint OTHER", "other holds no *.safetensors"),
        ("interpret RUN --explainer language-model --endpoint OTHER --cache FILE", "file is no file of answers"),
        ("interpret RUN --explainer language-model --endpoint OTHER --cache new --out new", "must be different files"),
        ("steer RUN --n-tokens 0", "--n-tokens must be at least 1"),
        ("steer RUN --n-new -1", "--n-new must be at least 0"),
        ("steer RUN --temperature -1", "--temperature must be at least 0"),
        ("steer RUN --temperature nan", "--temperature must be at least 0"),
        ("steer RUN --temperature inf", "--temperature must be at least 0"),
        ("steer RUN --value 1e38", "--value must be at least -1000000000000000 and at most 1000000000000000"),
        ("steer RUN --value=-inf", "--value must be"),
        ("steer RUN --value nan", "--value must be"),
        ("steer RUN --seed -1", "--seed must be at least 0"),
        ("steer RUN --layer 2", "--layer must be 0 to 1; got 2"),
        ("steer RUN --layer -1", "--layer must be 0 to 1; got -1"),
        ("steer RUN --neuron 32", "layer 1 has neurons 0 to 31"),
        ("steer RUN --neuron -1", "layer 1 has neurons 0 to 31"),
        ("steer RUN --neuron 100000000000000000000000", "--neuron must be at least"),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_read_or_made(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "shared.prepare",
        "train.train",
        "reproduce.make_reference_models",
        "reproduce.make_toys",
        "reproduce.reproduce_rates",
        "reproduce.reproduce_chapter_9",
        "reproduce.reproduce_sparser",
        "interpret.collect_for_protocols",
    ):
        monkeypatch.setattr(f"cratelab.cli.{name}", never)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "other/crate-toy-0").mkdir(parents=True)
    (tmp_path / "other/crate-toy-0/run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    places = {"RUN": str(run), "FILE": "file", "OTHER": "other"}
    fails([re.sub("RUN|FILE|OTHER", lambda found: places[found[0]], word) for word in arguments.split()], message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "was not begun by `cratelab train`"),
        ([1], "is damaged: command may hold"),
        ("train", "got 'train'"),
        ({}, "no corpus"),
        ({"rank": 7}, "unknown option 'rank', perhaps of a newer cratelab"),
        ({"run_dir": "elsewhere"}, "unknown option 'run_dir'"),
        ({"seed": None}, "seed cannot be None"),
        ({"seed": True}, "seed cannot be True"),
        ({"seed": 1.5}, "seed cannot be 1.5"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"steps": "4"}, "steps cannot be '4'"),
        ({"model": "bert"}, "model cannot be 'bert'"),
        ({"preset": ["toy"]}, "preset cannot be ['toy']"),
        ({"corpus": None}, "corpus cannot be None"),
        ({"batch": [1]}, "batch cannot be [1]"),
        ({"characters": 0}, "--characters must be at least 1"),
        ({"context": 10**11}, "--context must be at most"),
        ({"compile": 1}, "compile cannot be 1"),
        ({"peak_rate": "fast"}, "peak_rate cannot be 'fast'"),
    ],
)
def test_odd_commands_in_a_run_are_named(change, message, copy):
    run = json.loads((copy / "run.json").read_text())
    run["command"] = run["command"] | change if isinstance(change, dict) and change else change
    (copy / "run.json").write_text(json.dumps(run))
    for arguments in ["train", "--resume", str(copy)], ["interpret", str(copy)], ["steer", str(copy)]:
        fails(arguments, message, str(copy))


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '{"command"', "\x00" * 40, "[" * 100_000])
def test_a_damaged_run_json_is_named(content, copy):
    (copy / "run.json").write_text(content)
    for arguments in ["train", "--resume", str(copy)], ["steer", str(copy)]:
        fails(arguments, str(copy / "run.json"))


@pytest.fixture
def essays(tmp_path, monkeypatch):
    """A folder of short texts, and a cache for their tokens."""
    monkeypatch.setenv("CRATELAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "essays").mkdir()
    for i in range(60):
        (tmp_path / f"essays/{i}.txt").write_text(f"text number {i} of many " * 50)
    return tmp_path / "essays"


def test_a_run_that_no_command_began_is_read_if_its_corpus_is_given(copy, essays, capsys):
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"command": None, "tokenizer": {}}))
    fails(["steer", str(copy)], "was not begun by `cratelab train`, so nothing says what it has read: give --corpus")
    main(["steer", str(copy), "--corpus", str(essays), "--tokenizer", "bytes", "--n-tokens", "200", "--n-new", "1"])
    assert "without: text number" in capsys.readouterr().out


def test_scores_overwrite_nothing_else(copy):
    before = (copy / "run.json").read_bytes()
    fails(["interpret", str(copy), "--out", str(copy / "run.json")], "run.json", "choose another name")
    fails(["interpret", str(copy), "--out", str(copy / "metrics.jsonl")], "metrics.jsonl")
    assert (copy / "run.json").read_bytes() == before


def test_options_that_an_older_version_did_not_have_are_the_usual_ones(copy, capsys):
    run = json.loads((copy / "run.json").read_text())
    run["command"] = {name: run["command"][name] for name in ("corpus", "preset", "model", "seed", "characters")}
    (copy / "run.json").write_text(json.dumps(run))
    main(["steer", str(copy), "--n-tokens", "200", "--n-new", "1"])
    assert "without: <begin>" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["interpret", "steer"])
def test_what_is_no_trained_model_is_named(command, copy, tmp_path):
    shutil.rmtree(copy / "model")
    fails(
        [command, str(copy)], f"{copy} holds a run that has not ended", f"cratelab train --resume {copy}; 1 of 1 steps"
    )
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"command": None}))
    fails([command, str(copy)], "has not ended", "go on with the call of `train` that began it")
    (copy / "run.json").write_text(json.dumps({"sae": {}, "recipe": {}}))
    fails([command, str(copy)], "of another kind, of auto-encoders: give the model")
    fails([command, str(tmp_path)], f"it holds runs: give one of them, such as {copy}")
    fails([command, str(tmp_path / "nothing")], "does not exist")
    fails([command, str(copy / "run.json")], "is a file: give the folder of a run or of a model")
    for held, said in ("manifest.json", "the tokens of a corpus"), ("cfg.json", "an auto-encoder"), ("x", "no model"):
        folder = tmp_path / held.partition(".")[0]
        folder.mkdir()
        (folder / held).write_text("{}")
        fails([command, str(folder)], f"{folder} holds no model", said)


def test_the_steps_of_an_unfinished_run_are_those_that_it_has_done(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"steps": 9}, "command": {"seed": 0}}))
    fails(["steer", str(tmp_path)], "0 of 9 steps are done")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    fails(["steer", str(tmp_path)], "2 of 9 steps are done")


def test_steer_never_draws_a_token_that_the_corpus_does_not_know(run, copy, capsys):
    corpus = prepare("tinyworld", characters=60_000, context=65)
    model = cl.load(run / "model")
    assert corpus.validation.n_vocab < model.config.vocab_size, "the vocabulary is padded"
    with torch.no_grad():  # all but the padding is unlikely
        model.norm.bias.zero_()[0] = 100.0
        model.token_embedding.weight[corpus.validation.n_vocab :, 0] = 100.0
    model.save(copy / "model")
    for temperature in "0", "1", "1000":
        main(["steer", str(copy), "--n-tokens", "200", "--n-new", "50", "--value", "1", "--temperature", temperature])
        *_, without, steered = capsys.readouterr().out.splitlines()
        assert len(without.split()) == len(steered.split()) == 1 + 12 + 50


def test_steer_takes_a_prompt_longer_than_the_context_and_adds_nothing_if_nothing_is_asked(run, capsys):
    prompt = "the dog " * 40
    with pytest.warns(UserWarning, match="do not fit the context of 65"):
        main(["steer", str(run), "--n-tokens", "200", "--n-new", "2", "--prompt", prompt])
    assert f"without: {prompt}" in capsys.readouterr().out
    main(["steer", str(run), "--n-tokens", "200", "--n-new", "0", "--prompt", "the dog"])
    assert capsys.readouterr().out.endswith("without: the dog\nwith: the dog\n")


def test_a_prompt_that_the_tokenizer_gives_up_on_is_named(run, monkeypatch):
    class PanicException(BaseException):
        """As tiktoken's, which derives from no Exception."""

    def panic(*_):
        raise PanicException("its pattern")

    monkeypatch.setattr("cratelab.corpora.tokenizers.WordEncoding.encode_ordinary", panic)
    with pytest.raises(SystemExit, match="gave up on 7 characters that begin 'the dog': its pattern"):
        main(["steer", str(run), "--n-tokens", "200", "--prompt", "the dog"])


@pytest.mark.parametrize("value", ["1e15", "-1e15", "0"])
@pytest.mark.parametrize("by", ["set", "add", "scale"])
def test_steer_gives_finite_numbers_up_to_the_largest_values(value, by, run, capsys):
    arguments = f"--neuron 3 --by {by} --value={value} --n-tokens 200 --n-new 2".split()
    main(["steer", str(run), *arguments])
    printed = capsys.readouterr().out
    assert "nan" not in printed.lower() and "inf" not in printed


def test_steer_says_what_cannot_be_steered(run, copy):
    model = cl.load(run / "model")
    with torch.no_grad():
        model.blocks[1].ista.D.zero_()
    model.save(copy / "model")
    fails(["steer", str(copy), "--n-tokens", "200"], "neuron 0 of layer 1 is not active in 200 tokens: give --value")
    small = cl.Crate(cl.CrateConfig(n_layers=2, n_heads=2, width=8, vocab_size=20, context=65))
    small.save(copy / "model")
    for command in "steer", "interpret":
        fails([command, str(copy), "--n-tokens", "200"], "the corpus has 494 tokens")


def test_interpret_keeps_the_scores_of_a_model_with_a_dead_layer(copy, tmp_path, capsys):
    model, out = cl.load(copy / "model"), tmp_path / "new" / "scores.json"
    with torch.no_grad():
        model.blocks[1].ista.D.zero_()
    model.save(copy / "model")
    main(["interpret", str(copy), "--n-tokens", "2000", "--protocols", "random-only", "--out", str(out)])
    rows = json.loads(out.read_text(), parse_constant=never)["rows"]
    assert [row["model"] for row in rows] == ["trained"] * 3 + ["untrained"] * 3
    assert rows[0]["dead"] >= 0.5 and "nan" not in capsys.readouterr().out


def undefined(*arguments, **options) -> list[SimpleNamespace]:
    numbers = dict.fromkeys(("mean", "control", "mean_defined"), float("nan"))
    row = {"protocol": "random-only", "explainer": "token", "interval": [float("nan"), float("inf")], "undefined": 1.0}
    return [SimpleNamespace(row=lambda: row | numbers)]


def test_numbers_that_are_not_defined_are_called_so_and_are_null_in_the_file(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cratelab.cli.interpret.evaluate", undefined)
    monkeypatch.setattr("cratelab.cli.interpret.collect_for_protocols", lambda *arguments, **options: None)
    main(["interpret", str(run), "--out", str(tmp_path / "scores.json")])
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["trained", "random-only", "token"] + ["undefined"] * 3 + ["100%"]
    assert json.loads((tmp_path / "scores.json").read_text())["rows"][0]["interval"] == [None, None]


def test_a_table_shows_what_is_not_defined(capsys):
    row = {"model": "crate", "preset": "toy", "parameters": 1000, "seeds": 1, "mean": 1.5, "half_width": None}
    nan = float("nan")
    print_table([row, row | {"mean": nan, "half_width": nan}, row | {"mean": None, "half_width": 0.25}], 0.5)
    assert [line.split()[4:] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        ["1.500"],
        ["undefined", "±", "undefined"],
        ["undefined", "±", "0.250"],
    ]


class Closed(io.StringIO):
    """A pipe whose reader has gone after the first line."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_pipe_that_is_closed_costs_neither_scores_nor_status(run, tmp_path, monkeypatch):
    monkeypatch.setattr("cratelab.cli.interpret.evaluate", undefined)
    monkeypatch.setattr("cratelab.cli.interpret.collect_for_protocols", lambda *arguments, **options: None)
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", None)
    main(["interpret", str(run), "--out", str(tmp_path / "scores.json")])
    assert len(json.loads((tmp_path / "scores.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(("encoding", "interval"), [("ascii", "1.500 +- 6.353"), ("cp1252", "1.500 ± 6.353")])
def test_compare_keeps_table_and_plot_on_a_terminal_that_knows_few_characters(
    encoding, interval, tmp_path, monkeypatch
):
    def compared(*arguments):
        return [
            {"model": model, "preset": "toy", "parameters": 9, "validation_loss": 1.0 + seed, "curve": [(1, 1.5)]}
            for model in ("crate", "gpt2")
            for seed in range(2)
        ]

    monkeypatch.setattr("cratelab.cli.compare.compare", compared)
    seen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", seen)
    main(["compare", "--seeds", "2", "--out", str(tmp_path), *SHORT])
    assert (tmp_path / "compare.png").is_file() and (tmp_path / "compare.json").is_file()
    assert interval in seen.buffer.getvalue().decode(encoding)


def test_control_characters_of_a_corpus_do_not_reach_the_terminal(run, monkeypatch, capsys):
    corpus = prepare("tinyworld", characters=60_000, context=65)
    monkeypatch.setattr(corpus.tokenizer, "decode", lambda tokens: "\x1b]0;owned\x07\x9b2J\n")
    monkeypatch.setattr("cratelab.cli.shared.prepare", lambda *arguments, **options: corpus)
    main(["steer", str(run), "--n-tokens", "200", "--n-new", "1"])
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned" in printed and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
    fails(["steer", "no\x1b[2Jthing"], "no\\x1b[2Jthing does not exist")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "not enough memory"),
        (ConnectionError("the hub cannot be reached"), "the hub cannot be reached"),
        (ImportError("pip install 'cratelab[corpora]'"), "pip install 'cratelab[corpora]'"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_can_go_wrong_ends_with_a_message(error, message, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("cratelab.cli.shared.prepare", fail)
    fails(["train", "--run-dir", str(tmp_path / "run")], message)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, RuntimeError, IndexError])
def test_a_fault_of_the_program_keeps_its_traceback(error, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise error("expected a tensor")

    monkeypatch.setattr("cratelab.cli.shared.prepare", fail)
    with pytest.raises(error):
        main(["train", "--run-dir", str(tmp_path / "run")])


@pytest.mark.parametrize(("command", "more"), [("train", "the same command goes on"), ("steer", "")])
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(command, more, run, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cratelab.cli.shared.prepare", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--run-dir", str(tmp_path / "run")] if command == "train" else ["steer", str(run)])
    assert stopped.value.code == 130
    made, said = capsys.readouterr().err.splitlines()
    assert made == "making the text of TinyWorld" and said.startswith(f"cratelab: stopped{'; ' if more else ''}{more}")


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers", "datasets"])
def test_a_missing_extra_is_named_with_what_to_install(package, essays, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    corpus = "wikitext" if package == "datasets" else str(essays)
    options = ["--tokenizer", {"tiktoken": "bytes", "tokenizers": "bpe-300", "datasets": "bytes"}[package]]
    run_dir = ["--run-dir", str(tmp_path / "run")]
    fails(["train", "--corpus", corpus, *options, *run_dir], f"'{package}'", "pip install 'cratelab[corpora]'")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize(("columns", "encoding"), [("20", "ascii"), ("40", "cp1252"), ("80", "ascii")])
def test_help_is_plain_text_on_narrow_terminals(command, columns, encoding, monkeypatch):
    seen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", seen)
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    text = seen.buffer.getvalue().decode(encoding)
    assert not stopped.value.code and "--help" in text and "\\u" not in text and "\\x" not in text


def test_layerwise_gives_the_rates_of_an_official_checkpoint(essays, tmp_path, capsys):
    args = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=257, block_size=65)
    torch.save({"model": official_weights(args), "model_args": args}, tmp_path / "ckpt.pt")
    checkpoint, reading = tmp_path / "ckpt.pt", ["--corpus", str(essays), "--tokenizer", "bytes"]
    main(["layerwise", str(checkpoint), *reading, "--n-tokens", "650", "--eps", "0.1"])
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "layerwise.json").read_text())
    model, corpus = load_run(Layerwise(checkpoint, corpus=str(essays), tokenizer="bytes"))
    tokens = torch.from_numpy(corpus.validation.validation_windows(65, 10))
    with torch.no_grad():  # of the first layer by hand
        block, z = model.blocks[0], model.token_embedding(tokens) + model.position_embedding.weight
        seen = block.attention_norm(z)
        eps = 0.1 * seen.norm(dim=-1).mean()
        sides = seen, block.attention_norm(z + block.attention(seen))
        before, after = (cl.coding_rate(each, float(eps)).mean() for each in sides)
    assert kept["eps"][0] == pytest.approx(float(eps), rel=1e-4)
    assert kept["layers"]["R before"][0] == pytest.approx(float(before), rel=1e-4)
    assert kept["layers"]["R after"][0] == pytest.approx(float(after), rel=1e-4)
    assert f"{float(before):.3g} → {float(after):.3g}" in printed and len(kept["layers"]["R^c random after"]) == 2
    main(["interpret", str(checkpoint), *reading, "--n-tokens", "2000", "--explainer", "token"])
    save(byte_encoding(), tmp_path / "bytes.json")
    main(["export", str(checkpoint), "--to", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "bytes.json")])
    assert cl.load(tmp_path / "out").token_embedding.weight.equal(model.token_embedding.weight)
    assert (tmp_path / "interpret.json").is_file()


def test_help_breaks_no_sentence():
    """tyro breaks the line of an option's help where the source does."""
    classes = [
        each
        for each in ast.parse(Path(inspect.getsourcefile(Layerwise)).read_text("utf8")).body
        if isinstance(each, ast.ClassDef)
    ]
    said = [each.value.value for own in classes for each in own.body[1:] if isinstance(each, ast.Expr)]
    assert len(said) > 40 and not [text for text in said if re.search(r"[^.]\n", text)]


def test_of_tinyworld_no_more_is_made_than_is_read_and_of_a_run_its_own(run, tmp_path):
    vocabulary = cl.load(run / "model").config.vocab_size
    args = dict(n_layer=1, n_head=1, n_embd=4, vocab_size=vocabulary, block_size=128)
    torch.save({"model": official_weights(args), "model_args": args}, tmp_path / "ckpt.pt")
    _, corpus = load_run(Layerwise(tmp_path / "ckpt.pt", corpus="tinyworld", n_tokens=10_000))
    assert 10_000 < len(corpus.validation) < 25_000 and len(corpus.training) < 30 * 10_000
    _, corpus = load_run(Layerwise(tmp_path / "ckpt.pt", corpus="tinyworld", n_tokens=1))
    assert len(corpus.validation)
    for named in None, "tinyworld":
        _, corpus = load_run(Layerwise(run, corpus=named, n_tokens=30_000))
        assert corpus.validation.facts() == json.loads((run / "run.json").read_text())["validation"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_can_be_typed(name, run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    (example,) = re.findall(r"^Example: (cratelab .*)$", capsys.readouterr().out, re.MULTILINE)
    parsed = []
    command = f"cratelab.cli.{name}"
    monkeypatch.setattr(f"{command}.check", parsed.append)
    monkeypatch.setattr(f"{command}.run", parsed.append)
    main(shlex.split(example)[1:])
    assert isinstance(parsed[0], COMMANDS[name]) and len(parsed) == 2


def test_a_shell_completes_commands_options_and_choices(tmp_path):
    """As typed in bash with a tab at its end, after the line that `README.md` gives."""
    (line,) = re.findall(r"^eval .*bash.*$", (Path(__file__).parents[1] / "README.md").read_text(), re.MULTILINE)
    tried = [["cratelab", "inter"], ["cratelab", "steer", "--neu"], ["cratelab", "train", "--preset", ""]]
    each = "COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=(); _tyro_cratelab; echo ${{COMPREPLY[@]}}; "
    asked = "".join(each.format(shlex.join(words), len(words) - 1) for words in tried)
    done = shell(f"{line}\n{asked}", tmp_path)
    assert done.stdout.decode().split("\n")[:3] == ["interpret", "--neuron", "toy 1L 2L 3L S B"], done.stderr


def test_a_device_is_chosen_by_name(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as where it would be taken
    monkeypatch.setattr("cratelab.cli.steer.run", lambda options: print(best_device()))
    main(["steer", str(run), "--device", "cpu"])
    assert capsys.readouterr().out == "cpu\n" and best_device().type == "cuda"
    fails(["steer", str(run), "--device", "hip:7"], "nothing can be computed on 'hip:7' here")
    # Accelerate obeys the same variable, so that training is there, too
    script = "from accelerate import Accelerator; print(Accelerator().device)"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {CHOSEN: "meta"}, capture_output=True)
    assert done.stdout == b"meta\n", done.stderr


@pytest.mark.parametrize("corpus", [r"C:\texts\a.txt", "a:b*c?.txt"])
def test_the_usual_run_directory_has_a_name_that_every_system_allows(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(corpus).write_text("One sentence after another, and no two alike but these. " * 2000)
    main(["train", "--corpus", corpus, "--tokenizer", "bytes", *TINY])
    (run_dir,) = Path("runs").iterdir()
    assert (run_dir / "model").is_dir() and not set(run_dir.name) & set('<>:"/\\|?*')


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("cratelab steer RUN --n-tokens 200 --n-new 60 2>&- | head -1", 0),  # longer than the context, which warns
        ("cratelab train --run-dir new --steps 1 --batch 2 --characters 60000 --context 65 >&- 2>&-", 0),
        ("cratelab interpret RUN --n-tokens 500 --protocols random-only --out scores.json > /dev/full", 1),
    ],
)
def test_files_are_written_whatever_becomes_of_the_output(command, status, run, tmp_path):
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(f"set -o pipefail; {command}".replace("RUN", str(run)), tmp_path, **ASCII)
    assert done.returncode == status and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    if "interpret" in command:
        assert len(json.loads((tmp_path / "scores.json").read_text())["rows"]) == 6
    if "train" in command:
        assert isinstance(cl.load(tmp_path / "new/model"), cl.Crate) and (tmp_path / "new/loss.png").is_file()


def test_export_writes_what_transformers_loads_and_a_card_that_says_where_it_comes_from(run, tmp_path, capsys):
    from transformers import AutoTokenizer

    main(["export", str(run), "--to", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "/out', trust_remote_code=True) is the model" in said and "/out') its tokenizer" in said
    ours = cl.load(run / "model")
    again = cl.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in ours.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    kept = cl.corpora.tokenizers.load(run / "tokenizer.json")
    assert tokenizer("the cat").input_ids == kept.encode_ordinary("the cat")
    card, facts = (tmp_path / "out/README.md").read_text(), json.loads((run / "run.json").read_text())
    (made,) = re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert json.loads(made) == {
        part: facts[part] for part in ("recipe", "tokenizer", "training", "validation", "provenance")
    }
    loss = read_metrics(run)[-1]["validation_loss"]
    assert f"Text: `tinyworld`. Loss on held-out text: {loss:.3f} nats a token" in card
    assert "\n# out\n" in card and "## Licence\n\nUnknown" in card and "MIT" in card
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings["eos_token_id"] == kept.eot_token
    assert settings["suppress_tokens"] == list(range(kept.n_vocab, ours.config.vocab_size))


def test_export_of_a_packaged_model_whose_training_is_unknown(tmp_path):
    reference = Path(cl.__file__).parent / "reference"
    options = ["--to", str(tmp_path / "out"), "--tokenizer", str(reference / "tokenizer.json")]
    main(["export", str(reference / "gpt2-1L-0"), *options])
    card = (tmp_path / "out/README.md").read_text()
    assert "Nothing is known about its training" in card and "trust_remote_code" not in card
    assert isinstance(cl.load(tmp_path / "out"), cl.Gpt2)


def test_export_says_where_the_folder_is_and_how_its_tokenizer_is_read(run, tmp_path, monkeypatch, capsys):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    main(["export", str(run), "--to", "missing/../out"])
    said = "AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True) is the model, "
    assert capsys.readouterr().out == f"{said}PreTrainedTokenizerFast.from_pretrained('out') its tokenizer\n"
    kept = cl.corpora.tokenizers.load(run / "tokenizer.json")
    assert PreTrainedTokenizerFast.from_pretrained("out")("the cat").input_ids == kept.encode_ordinary("the cat")
    card = Path("out/README.md").read_text()
    assert 'PreTrainedTokenizerFast.from_pretrained("out")\n' in card
    fails(["export", "out", "--to", "again"], "out is a folder for transformers already, with its tokenizer: copy it")
    theirs = ["--to", "again", "--tokenizer", "out/tokenizer.json"]
    fails(["export", "out", *theirs], "it is one of the library tokenizers: give the tokenizer.json of a run")
    main(["export", "out", "--to", "again", "--tokenizer", str(run / "tokenizer.json")])
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_export_refuses_before_it_loads_anything(run, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("cratelab.cli.export.load_model", None)
    to = ["--to", str(tmp_path / "out")]
    fails(["export", str(run), "--to", str(run)], "is not an empty folder: choose another")
    fails(["export", str(run), "--to", str(run / "run.json")], "is not an empty folder: choose another")
    (copy / "model/tokenizer_config.json").touch()
    fails(["export", str(copy), *to], "is a folder for transformers already, with its tokenizer: copy it as it is")
    fails(["export", str(tmp_path / "nothing"), *to], "does not exist: give the folder of a run or of a model")
    (copy / "model/tokenizer_config.json").unlink()
    (copy / "tokenizer.json").unlink()
    fails(["export", str(copy), *to], f"no tokenizer {copy / 'tokenizer.json'}: give --tokenizer")
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(["export", str(run), *to], "pip install 'cratelab[transformers]'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["interpret", "layerwise"])
def test_results_replace_nothing_but_their_like(command, copy):
    before = (copy / "run.json").read_bytes()
    options = [command, str(copy), "--n-tokens", "500", "--out"]
    fails([*options, str(copy / "run.json")], "run.json is there and holds something else than such results")
    fails([*options, str(copy / "model")], "--out must be a file to write")
    assert (copy / "run.json").read_bytes() == before
    for _ in range(2):
        main([*options, str(copy / "x.passes")])  # as nearly as what a killed pass leaves is called
    assert json.loads((copy / "x.passes").read_text())["provenance"]


def test_layerwise_reads_no_more_tokens_than_it_is_told(copy, capsys):
    main(["layerwise", str(copy), "--n-tokens", "10", "--out", str(copy / "new folder" / "rates.json")])
    assert "1 windows of 10 tokens" in capsys.readouterr().out


def test_export_of_a_run_takes_no_other_tokens_and_survives_an_odd_run_json(copy, tmp_path):
    save(byte_encoding(), tmp_path / "bytes.json")
    options = ["export", str(copy), "--to", str(tmp_path / "out")]
    fails([*options, "--tokenizer", str(tmp_path / "bytes.json")], "was trained on other tokens (words, ")
    (copy / "run.json").write_text('{"command": 5, "tokenizer": [], "provenance": null}')
    main(options)
    assert "Text: `unknown`" in (tmp_path / "out/README.md").read_text()
