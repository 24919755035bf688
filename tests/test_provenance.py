import json
import os
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import cratelab as cl
from cratelab import provenance as module


def test_provenance_names_what_ran_and_where(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/on/disk/run.py", "--seeds", "3"])
    facts = module.provenance(seeds=[0, 1, 2])
    assert facts["command"] == "run.py --seeds 3" and facts["seeds"] == [0, 1, 2]
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert not any("somewhere" in str(value) for value in facts.values())
    json.dumps(facts, allow_nan=False)


def test_the_library_that_computed_is_named_and_a_change_of_its_code_shows(monkeypatch):
    assert cl.mssa and cl.ista  # names are loaded when they are first used
    facts = json.loads(json.dumps(module.provenance()))
    assert {"coding_rate", "mssa", "ista"} <= facts["library"].keys()
    assert not [name for name in facts["library"] if name.split(".")[0] in module.SPEAKS]
    assert module.changed_since(facts) == [] and module.changed_since({}) is None
    source = module.inspect.getsource

    def edited(which):
        text = source(which)
        return text.replace("z - step_size *", "z + step_size *") if which.__name__ == "cratelab.mssa" else text

    for change, changed in ((edited, ["mssa"]), (lambda which: "# a comment\n" + source(which), [])):
        monkeypatch.setattr(module.inspect, "getsource", change)
        module._digest_of_module.cache_clear()
        assert module.changed_since(facts) == changed
    monkeypatch.undo()
    module._digest_of_module.cache_clear()
    assert module.changed_since({"library": {"gone": "0"}}) == ["gone"]


def test_a_table_of_parts_names_the_code_that_made_them():
    """Made by two codes, a module is not what it was for one of them, whichever there is now."""
    assert cl.mssa and cl.ista
    now = module.library_code()
    before = now | {"mssa": "0" * 12}
    del before["ista"]
    for parts, changed in (([now, now], []), ([now, before], ["mssa"]), ([before, now], ["mssa"])):
        library = module.code_of([{"library": part} for part in parts])
        assert library.keys() == now.keys() and module.changed_since({"library": library}) == changed
    unknown = module.code_of([{"library": now}, {"commit": "0"}])
    assert unknown is None and module.changed_since({"library": unknown}) is None


def test_commit_is_none_outside_a_checkout_and_marked_where_files_changed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.provenance()["commit"] is None
    git = "git -c user.name=a -c user.email=a@example.org"
    (tmp_path / "file").write_text("one")
    assert os.system(f"git init -q . && git add file && {git} commit -qm one") == 0
    commit = module.provenance()["commit"]
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert module.provenance()["commit"] == commit + "+changes"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--api-key", "s3cret", "--n-tokens", "20"], "--api-key *** --n-tokens 20"),
        (["--api-key=s3cret & s3cret", "--tokenizer=bytes"], "--api-key=*** --tokenizer=bytes"),
        (["--hfToken", "s3cret", "--key-frames", "7"], "--hfToken *** --key-frames 7"),
        (["A_KEY=s3cret", "sk-proj-s3cret", "hf_s3cret", "runs/task-s3cret"], "A_KEY=*** *** *** runs/task-s3cret"),
        (["-H", "Authorization: Bearer s3cret"], "-H Authorization: ***"),
        (["-H", "X-Api-Key: s3cret"], "-H X-Api-Key: ***"),
        (["--headers", '{"api_key": "s3cret", "model": "m"}'], '--headers {"api_key": ***, "model": "m"}'),
        (["https://me:s3cret@host/v1?token=s3cret&model=m"], "https://***@host/v1?token=***&model=m"),
        (["https://s3cret@host/v1"], "https://***@host/v1"),
        (["--password"], "--password"),
    ],
)  # fmt: skip
def test_keys_and_passwords_are_not_in_the_command(monkeypatch, arguments, shown):
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    assert module.provenance()["command"] == f"run.py {shown}"


def test_a_process_without_arguments_has_a_provenance(monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    assert module.provenance()["command"] == ""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository in the current folder, with one committed file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "file").write_text("one")
    git = "git -c user.name=a -c user.email=a@example.org"
    assert os.system(f"git init -q . && git add file && {git} commit -qm one") == 0
    return tmp_path


@pytest.mark.parametrize("change", ["fsmonitor", "hook", "a", "a=b"])
def test_no_program_of_a_repository_is_run(checkout, change):
    """The trap is sprung by a plain `git status`, but not by the record of where a number comes from."""
    trap = checkout / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {checkout}/sprung\ncat\n")
    trap.chmod(0o755)
    if change == "fsmonitor":
        os.system(f"git config core.fsmonitor {trap}")
    elif change == "hook":
        (checkout / ".git" / "hooks").mkdir(exist_ok=True)
        trap.rename(checkout / ".git" / "hooks" / "post-index-change")
    else:
        os.system(f"git config filter.{change}.clean {trap} && git config filter.{change}.required true")
        (checkout / ".git" / "info").mkdir(exist_ok=True)
        (checkout / ".git" / "info" / "attributes").write_text(f"* filter={change}\n")
    os.utime(checkout / "file", (1, 1))
    assert module.provenance()["commit"] and not (checkout / "sprung").exists()
    subprocess.run(["git", "status"], capture_output=True)
    assert (checkout / "sprung").exists()


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, timeout, **options: run(*a, timeout=timeout / 100, **options))
    start = time.perf_counter()
    assert module.provenance()["commit"] is None and time.perf_counter() - start < 10


def test_an_unknown_table_is_named_with_those_there_are():
    assert {"provenance", "findings"} <= module.read_reference("05_crate").keys()
    with pytest.raises(FileNotFoundError, match=r"'none'; there are .*05_crate"):
        module.read_reference("none")


def test_best_device_holds_a_tensor():
    assert torch.zeros(1, device=cl.best_device()).device.type == cl.best_device().type


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    def version(package):
        if package == "cratelab":
            raise PackageNotFoundError(package)
        return "2.0"

    monkeypatch.setattr(module, "version", version)
    facts = module.provenance()
    assert facts["cratelab"] is None and facts["torch"] == "2.0"


ROOT = Path(cl.__file__).parents[1]
TABLES = sorted([*ROOT.glob("cratelab/reference/*.json"), *ROOT.glob("book/reference/*.json")])


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_a_published_table_names_no_place_of_the_machine_that_made_it(file):
    text = file.read_text(encoding="utf8")
    assert not re.search(r"""(?<![\w.*)])/(?:home|root|tmp|usr|var|work|mnt|Users)/|[A-Z]:\\\\""", text)
    command = json.loads(text).get("provenance", {}).get("command", "cratelab")
    assert not re.search(r"""(?:^|[\s="'])/|^__main__""", command), command
