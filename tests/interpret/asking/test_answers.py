import contextlib
import inspect
import json
import math
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
from language_model_server import next_token, understanding
from many_processes import launch

from cratelab.interpret.asking.answers import AnswerCache, ask
from cratelab.interpret.asking.endpoints import Request


def test_where_there_is_no_stderr_questions_are_asked_all_the_same(serve, connect, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert len(list(ask(connect(serve(understanding), chat=False), [Request(("cat\t",), top=5)]))) == 1


def test_log_probabilities_that_are_none_are_not_kept(serve, connect, tmp_path):
    server = serve(lambda *request: (200, {}, {"choices": [{"logprobs": {"top_logprobs": [{"7": 3.0, "8": -1.0}]}}]}))
    for _ in range(2):
        (answer,) = ask(connect(server, chat=False), [Request(("x\t",), top=5)], tmp_path / "answers.sqlite")
        assert answer == {"problem": "a log-probability that is none"}
    assert len(server.requests) == 2


RUN = """
import sys, torch
from cratelab.interpret.asking.endpoints import OpenAIEndpoint, Request
from cratelab.interpret.asking.answers import ask
endpoint = OpenAIEndpoint(sys.argv[1], "tiny", concurrency=3)
list(ask(endpoint, [Request((f"{n}\\t",), top=5) for n in range(60)], sys.argv[2]))
"""


def test_a_killed_run_goes_on_where_it_stopped(serve, connect, tmp_path):
    reached, dead = threading.Event(), threading.Event()

    def reply(path, body, n):
        if n >= 25:  # these come while the first run lives, and are not answered before it is dead
            reached.set()
            dead.wait(10)
        return understanding(path, body, n)

    server, cache = serve(reply), tmp_path / "answers"
    run = subprocess.Popen([sys.executable, "-c", RUN, server.url, cache])
    assert reached.wait(60)
    run.send_signal(signal.SIGKILL)
    run.wait()
    dead.set()
    answered = len(server.requests)
    requests = [Request((f"{n}\t",), top=5) for n in range(60)]
    assert len(list(ask(connect(server), requests, cache))) == 60
    assert 25 <= answered <= 27 and len(server.requests) - 60 <= 3  # those on their way are asked again


def test_the_cache_survives_damage_by_saying_so(tmp_path):
    path = tmp_path / "answers"
    with AnswerCache(path) as cache:
        cache.put("key", {"text": "yes"})
        cache.put("key", {"text": "no", "nan": math.nan})
    with AnswerCache(path) as cache:
        assert cache.get("key")["text"] == "no" and cache.get("other") is None
    path.write_bytes(b"not a database, and long enough to tell" * 100)
    with pytest.raises(ValueError, match="is no file of answers"):
        AnswerCache(path)


def make_read_only(path):
    with AnswerCache(path):
        pass
    with path.open("r+b") as file:
        file.seek(18)
        file.write(b"\x09")  # a file format that this SQLite can only read: as in a folder that one may not write


def hold(path):
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other


def put(path):
    with AnswerCache(path) as cache:
        cache.put("key", {"text": "yes"})


def test_no_name_is_no_file_of_answers():
    """SQLite would take it for a file that it removes at the end."""
    with pytest.raises(OSError, match=r"the answers in  cannot be read or written"):
        AnswerCache("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.mkdir(), "unable to open"),
        (make_read_only, "readonly"),
        (hold, "locked"),
    ],
)
def test_answers_that_cannot_be_kept_are_an_os_error_that_names_the_file(spoil, message, tmp_path, monkeypatch):
    monkeypatch.setattr("cratelab.interpret.asking.answers.PATIENCE", 0.01)
    path = tmp_path / "answers"
    held = spoil(path)
    with pytest.raises(OSError, match=f"{path} cannot be read or written: .*{message}"):
        put(path)
    if held:
        held.close()


def test_a_full_disk_is_an_os_error_and_what_was_kept_stays(tmp_path):
    path = tmp_path / "answers"
    with AnswerCache(path) as cache:
        cache.put("key", {"text": "yes"})
        cache._file.execute("PRAGMA max_page_count = 4")
        with pytest.raises(OSError, match=f"{path} cannot be read or written: .*full"):
            cache.put("other", {"text": "no" * 100_000})
        assert cache.get("key") == {"text": "yes"}
    put(path)


def other_columns(path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE answers (question, reply)")


def second_half_lost(path):
    put(path)
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        rows = [(str(n), json.dumps({"text": "yes" * 100})) for n in range(200)]
        other.executemany("INSERT INTO answers VALUES (?, ?)", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 8 * 4] + bytes(len(whole) // 8 * 4))


def holds(written):
    def spoil(path):
        put(path)
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE answers SET answer = ?", (written,))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        other_columns,
        second_half_lost,
        *map(holds, ["{", "[]", "null", "3", "[" * 100_000, b"\xff\xfe\x00", '{"text": 3}', '{"next": 5}']),
        *map(holds, ['{"next": [[["a"]]]}', '{"next": [[["a", null]]]}', '{"next": [[[3, -1.0]]]}', '{"next": null}']),
    ],
)
def test_damaged_answers_are_a_value_error_that_names_the_file(spoil, tmp_path):
    path = tmp_path / "answers"
    spoil(path)
    refused = pytest.raises(ValueError, match=f"{path} (is no file of answers|holds an answer that is damaged)")
    with refused, AnswerCache(path) as cache:
        [cache.get(key) for key in ("key", *map(str, range(200)))]


def test_two_servers_with_models_of_one_name_have_answers_of_their_own(serve, connect, tmp_path):
    cache, asked = tmp_path / "answers", [Request(("cat\t",), top=5)]
    first = serve(understanding)
    second = serve(lambda path, body, n: (200, {}, next_token({"5": 1.0})))
    found = [list(ask(connect(server, chat=False), asked, cache)) for server in (first, second, first, second)]
    assert found[0] == found[2] != found[1] == found[3]
    assert len(first.requests) == len(second.requests) == 1


def test_answers_of_an_older_file_are_no_error(serve, connect, tmp_path):
    server, request = serve(understanding), Request(("cat\t",), top=5)
    with AnswerCache(tmp_path / "answers") as cache:
        cache.put(request.key('["tiny", false, {}]'), {"next": [[["0", -1.0]]]})
    (answer,) = ask(connect(server, chat=False), [request], tmp_path / "answers")
    assert answer["next"][0][0][0] == "7"


def test_two_writers_share_a_file_of_answers(tmp_path):
    def write(writer):
        with AnswerCache(tmp_path / "answers") as cache:  # a connection of its own, locked out as another process is
            for n in range(8):
                cache.put(f"{n}", {"text": str(writer)})
                cache.put(f"{n}-{writer}", {"text": "mine"})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    with contextlib.closing(sqlite3.connect(tmp_path / "answers")) as file:
        assert file.execute("SELECT COUNT(*) FROM answers").fetchone() == (8 + 24,)


class Counting:
    """Answers with what was asked, and with a problem every seventh time; the second process is killed after some."""

    name, concurrency = "counting", 1

    def __init__(self, kill_after: int = -1):
        self.kill_after, self.asked = kill_after, []

    def answer(self, request: Request) -> dict:
        import os

        if len(self.asked) == self.kill_after and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append(n := int(request.text))
        return {"problem": f"{n} is bad"} if n % 7 == 3 else {"text": f"{n} is good"}


SHARED = f"""
import json, os, signal, sys
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.answers import ask
{inspect.getsource(Counting)}
endpoint = Counting(int(sys.argv[2]))
requests = (Request((str(n % 550),)) for n in range(600))
found = list(ask(endpoint, requests, sys.argv[1] + "/answers.sqlite", 600, share=True))
with open(sys.argv[1] + "/" + os.environ["RANK"], "w") as file:
    json.dump([found, endpoint.asked], file)
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_questions_and_all_get_all_answers(processes, tmp_path):
    """Of two groups, with questions that come again in the other one."""
    alone = Counting()
    expected = list(ask(alone, [Request((str(n % 550),)) for n in range(600)], tmp_path / "alone.sqlite"))
    done = launch(processes, SHARED, tmp_path, -1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(processes)]
    assert all(answers == expected for answers, _ in found)
    shares = [asked for _, asked in found]
    assert sorted(chain(*shares)) == sorted(alone.asked)
    assert max(map(len, shares)) - min(map(len, shares)) <= 20


def test_of_killed_processes_no_answer_is_lost(tmp_path):
    assert launch(2, SHARED, tmp_path, 100).returncode
    with AnswerCache(tmp_path / "answers.sqlite") as known:
        kept = {n for n in range(550) if known.get(Request((str(n),)).key("counting"))}
    assert len([n for n in kept if n % 2]) >= 80  # of the second's 100, but for problems
    done = launch(3, SHARED, tmp_path, -1)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = [n for rank in range(3) for n in json.loads((tmp_path / str(rank)).read_text())[1]]
    assert asked and not kept & set(asked)
