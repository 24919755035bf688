"""What `benchmarks/gpu_queue.sh` leaves when it is cut off, and what it needs. Its numbers are no tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_tests  # noqa: E402
from results import Results  # noqa: E402


def test_rows_are_on_the_disk_as_they_come_and_are_found_again(tmp_path):
    file = tmp_path / "speed.json"
    first = Results(file, toy=True)
    assert not file.exists()
    first.add("block", {"seconds": 0.5, "share": float("nan")})
    assert json.loads(file.read_text())["rows"] == {"block": {"seconds": 0.5, "share": None}}
    again = Results(file, toy=True)
    again.add("model", {"seconds": 2})
    assert list(Results(file, toy=True).rows) == ["block", "model"]


def test_rows_that_were_made_otherwise_are_not_mixed_with_new_ones(tmp_path):
    Results(tmp_path / "speed.json", recipe={"steps": 3}).add("block", {})
    with pytest.raises(
        ValueError, match=r"speed\.json holds other results \(recipe was .*3.*, now .*4.*choose another"
    ):
        Results(tmp_path / "speed.json", recipe={"steps": 4})
    held = json.loads((tmp_path / "speed.json").read_text())
    held["provenance"]["device"] = "another"
    (tmp_path / "speed.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match="device was another, now"):
        Results(tmp_path / "speed.json", recipe={"steps": 3})


def test_tests_that_passed_are_not_run_again(tmp_path):
    keeper = gpu_tests.Keeper(Results(tmp_path / "tests.json"))
    for name, when, outcome in [
        ("one", "setup", "passed"),
        ("one", "call", "passed"),
        ("two", "call", "failed"),
        ("three", "setup", "skipped"),
    ]:
        report = dict(nodeid=name, when=when, outcome=outcome, passed=outcome == "passed", duration=0.1, longrepr="why")
        keeper.pytest_runtest_logreport(SimpleNamespace(**report))
    kept = json.loads((tmp_path / "tests.json").read_text())["rows"]
    assert kept["one"] == {"outcome": "passed", "seconds": 0.1}
    assert kept["two"] == {"outcome": "failed", "seconds": 0.1, "why": "why"} and kept["three"]["outcome"] == "skipped"
    items = [SimpleNamespace(nodeid=name) for name in ("one", "two", "three", "four")]
    gpu_tests.pytest_collection_modifyitems(SimpleNamespace(outcomes=Results(tmp_path / "tests.json")), items)
    assert [item.nodeid for item in items] == ["two", "three", "four"]


def test_the_stages_do_without_what_a_gpu_machine_lacks():
    """In a process to which these packages do not exist."""
    code = """if True:
        import sys
        for name in "tyro", "datasets", "nbval", "jupytext", "nbformat", "httpx2", "zstandard":
            sys.modules[name] = None
        import gpu_reference, gpu_speed, gpu_tests
        from cratelab.corpora.prepare import prepare
        prepare("tinyworld", characters=50_000, context=96)
    """
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("arguments", [[], ["--stage", "4", "out"], ["--stage"], ["--fast", "out"], ["a", "b", "c"]])
def test_a_wrong_call_of_the_queue_is_answered_by_its_usage(arguments, tmp_path):
    queue = ["bash", BENCHMARKS / "gpu_queue.sh", *arguments]
    run = subprocess.run(queue, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "gpu_queue.sh [--toy] [--stage N]" in run.stderr and not list(tmp_path.iterdir())
