import json
import os
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import cratelab as cl
from cratelab import record


def test_provenance_names_what_ran_and_where(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/on/disk/run.py", "--seeds", "3"])
    facts = record.provenance(seeds=[0, 1, 2])
    assert facts["command"] == "run.py --seeds 3" and facts["seeds"] == [0, 1, 2]
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert not any("somewhere" in str(value) for value in facts.values())
    json.dumps(facts, allow_nan=False)


def test_commit_is_none_outside_a_checkout_and_marked_where_files_changed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.provenance()["commit"] is None
    git = "git -c user.name=a -c user.email=a@example.org"
    (tmp_path / "file").write_text("one")
    assert os.system(f"git init -q . && git add file && {git} commit -qm one") == 0
    commit = record.provenance()["commit"]
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert record.provenance()["commit"] == commit + "+changes"


def test_an_unknown_table_is_named_with_those_there_are():
    assert {"provenance", "findings"} <= record.read_reference("05_crate").keys()
    with pytest.raises(FileNotFoundError, match=r"'none'; there are .*05_crate"):
        record.read_reference("none")


def test_best_device_holds_a_tensor():
    assert torch.zeros(1, device=cl.best_device()).device.type == cl.best_device().type


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    def version(package):
        if package == "cratelab":
            raise PackageNotFoundError(package)
        return "2.0"

    monkeypatch.setattr(record, "version", version)
    facts = record.provenance()
    assert facts["cratelab"] is None and facts["torch"] == "2.0"
