"""A pass over text by several processes gives what one gives, and a killed one goes on."""

import shutil
import subprocess
import textwrap
from itertools import chain

import pytest
import torch
from many_processes import launch
from test_training import corpus, new_model

from cratelab import shared_pass
from cratelab.interpret.records import Records, collect_records
from cratelab.interpret.running_records import RunningRecords
from cratelab.shared_pass import forget
from cratelab.storage import read_tensors

SUMS = "mean", "variance"
SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from test_shared_records import gather
    from cratelab import shared_pass
    from cratelab.interpret.running_records import RunningRecords
    folder, out, kill_after = sys.argv[1], sys.argv[2], int(sys.argv[3])
    shared_pass.KEEP_EVERY = 0
    read, update = [], RunningRecords.update

    def counted(self, text, *others):
        if len(read) == kill_after and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, text, *others)
        read.append(text.number)

    RunningRecords.update = counted
    os.makedirs(out, exist_ok=True)
    mine = out + "/" + os.environ["RANK"]
    gather(folder).save(mine)
    open(mine + "/read", "w").write(" ".join(map(str, read)))
    gather(folder, as_published=True).save(mine + "-published")
"""


def gather(folder=None, as_published=False) -> Records:
    """Of a text with many equal passages, and so many equal activations, in some twenty batches."""
    model, text = new_model(n_layers=2).eval(), corpus(n=900)
    return collect_records(model, text, 4, 6, 5, 7, seed=3, batch=4, as_published=as_published, folder=folder)


def start(processes: int, *arguments) -> subprocess.CompletedProcess:
    return launch(processes, textwrap.dedent(SCRIPT), *arguments)


def check_same(found: Records, expected: Records) -> None:
    """All that is no sum to the bit; sums as far as their order matters in double precision."""
    for name, tensor in expected._tensors().items():
        if name in SUMS:
            torch.testing.assert_close(found._tensors()[name], tensor, rtol=1e-12, atol=1e-14)
        else:
            assert found._tensors()[name].equal(tensor), name
    assert found.n_tokens == expected.n_tokens


def batches(folder) -> list[list[int]]:
    """Which each process has read."""
    return [list(map(int, file.read_text().split())) for file in sorted(folder.glob("*/read"))]


@pytest.fixture(scope="module")
def alone() -> Records:
    return gather()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_text_and_merge_to_what_one_gives(processes, alone, tmp_path):
    done = start(processes, tmp_path / "kept", tmp_path / "out", -1)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = batches(tmp_path / "out")
    assert len(shares) == processes and sorted(chain(*shares)) == list(range(sum(map(len, shares))))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rank in range(processes):
        check_same(Records.load(tmp_path / "out" / str(rank)), alone)
        check_same(Records.load(tmp_path / "out" / f"{rank}-published"), gather(as_published=True))


def test_a_killed_pass_goes_on_with_another_number_of_processes_or_one(alone, tmp_path):
    assert start(3, tmp_path / "kept", tmp_path / "out", 3).returncode
    files = (tmp_path / "kept").glob("*/process-*.safetensors")
    held = {file.name: read_tensors(file)["_extra_state"].tolist()[1:] for file in files}
    assert held["process-1.safetensors"] == [1, 4, 7]
    done = start(2, tmp_path / "kept", tmp_path / "out", -1)
    assert done.returncode == 0, done.stderr[-3000:]
    again = list(chain(*batches(tmp_path / "out")))
    assert again and not set(again) & set(chain(*held.values()))
    check_same(Records.load(tmp_path / "out" / "0"), alone)
    check_same(gather(tmp_path / "kept"), alone)  # one process reads nothing, and merges


def test_one_process_goes_on_to_the_same_bits(alone, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    read, update = [], RunningRecords.update

    def counted(self, text, *others):
        if len(read) == 5:
            raise Killed
        read.append(text.number)
        update(self, text, *others)

    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    monkeypatch.setattr(RunningRecords, "update", counted)
    with pytest.raises(Killed):
        gather(tmp_path)
    read.append(None)
    found = gather(tmp_path)
    assert read[:5] == [0, 1, 2, 3, 4] and read[6] == 5
    for name, tensor in alone._tensors().items():
        assert found._tensors()[name].equal(tensor), name


def test_what_is_kept_is_of_one_pass_alone_and_forgotten_when_told(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    gather(tmp_path, as_published=True)
    (tmp_path / "mine.txt").write_text("not of a pass")
    check_same(gather(tmp_path), alone)
    files = list(tmp_path.glob("*/process-0.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"process-0.safetensors does not hold what a pass has kept: .*Remove it"):
        gather(tmp_path)
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_tokens_that_are_missing_or_read_twice_are_noticed(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    gather(tmp_path)
    (file,) = tmp_path.glob("*/process-0.safetensors")
    shutil.copy(file, file.with_name("process-1.safetensors"))
    with pytest.raises(ValueError, match="have read 1800 tokens together, some of them twice, and not 900"):
        gather(tmp_path)


def test_a_model_of_the_same_weights_and_other_settings_is_another_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    model, text = new_model().eval(), corpus(n=300)
    other = new_model(n_steps=1, span=0).eval()
    other.load_state_dict(model.state_dict())
    collect_records(model, text, 4, folder=tmp_path)
    check_same(collect_records(other, text, 4, folder=tmp_path), collect_records(other, text, 4))


def test_a_pass_survives_that_another_forgets_all(alone, tmp_path, monkeypatch):
    update = RunningRecords.update

    def forgetting(self, *args):
        if self.batches:
            forget(tmp_path)
        update(self, *args)

    monkeypatch.setattr(shared_pass, "KEEP_EVERY", 0)
    monkeypatch.setattr(RunningRecords, "update", forgetting)
    check_same(gather(tmp_path), alone)
