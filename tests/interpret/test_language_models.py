import base64
import contextlib
import gzip
import json
import math
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from cratelab import storage
from cratelab.interpret.asking import endpoints
from cratelab.interpret.asking.answers import AnswerCache, Cost, ask
from cratelab.interpret.asking.endpoints import OpenAIEndpoint, Request
from cratelab.interpret.asking.local_endpoint import HuggingFaceEndpoint
from cratelab.interpret.asking.prompts import as_question, escape, explanation_prompt, simulation_prompt
from cratelab.interpret.language_models import (
    NO_NUMBER,
    LanguageModelExplainer,
    LanguageModelSimulator,
    TextExplanations,
    select_neurons,
)
from cratelab.interpret.records import NO_TOKEN, Excerpts
from cratelab.interpret.scores import score

httpx2 = pytest.importorskip("httpx2", reason="the extra `interpret` is not installed")

WORDS = ["sun", " cat", " sat", "a\tb", "x\ny", "unknown", "<|endoftext|>", "\ud800", "\\n", "�", "10", " <b>", ""]


class Words:
    """A tokenizer of hostile words."""

    def decode(self, tokens):
        return "".join(WORDS[token] for token in tokens)


class Api(ThreadingHTTPServer):
    """A server on this machine. `reply(path, body, n)` gives (status, headers, JSON or bytes) of the n-th request."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.path, json.loads(body or "null"), dict(self.headers)))
            n = len(self.server.requests)
        status, headers, content = self.server.reply(self.path, json.loads(body or "null"), n)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = "Content-Length" in headers  # a lie about the length is a cut connection

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def _on_the_cpu():  # where records are, whatever the tests' default device
    with torch.device("cpu"):
        yield


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Api(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(monkeypatch):
    # without the system's certificates, which no server here needs and every client takes 0.1 s to read
    monkeypatch.setattr(httpx2, "AsyncClient", partial(httpx2.AsyncClient, verify=False))
    opened = []

    def connect(server, model="tiny", **options):
        options = {"backoff": 0.001, "echo": False} | options
        opened.append(OpenAIEndpoint(getattr(server, "url", server), model, **options))
        return opened[-1]

    yield connect
    for endpoint in opened:
        endpoint.close()


def next_token(probabilities, path="/v1/completions", modern=False):
    """The API's JSON for the likeliest next tokens."""
    logs = {token: math.log(p) for token, p in probabilities.items()}
    best = max(logs, key=logs.get)
    entries = {"token": best, "logprob": logs[best], "bytes": None}
    entries["top_logprobs"] = [{"token": token, "logprob": p, "bytes": None} for token, p in logs.items()]
    old = {"tokens": [best], "token_logprobs": [logs[best]], "top_logprobs": [logs], "text_offset": [0]}
    choice = {"index": 0, "finish_reason": "length"}
    choice["logprobs"] = {"content": [entries]} if "chat" in path or modern else old
    choice |= {"message": {"role": "assistant", "content": best}} if "chat" in path else {"text": best}
    return {"id": "1", "object": "completion", "choices": [choice], "usage": {"prompt_tokens": 1}}


def written(text, path="/v1/chat/completions"):
    choice = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
    return {"choices": [{"index": 0, **choice, "finish_reason": "stop"}]}


def prompt_of(body):
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def last_token(body):
    return prompt_of(body).removesuffix(as_question("")).rpartition("\n")[2].removesuffix("\t")


HIGH, LOW = {" 7": 0.6, "8": 0.2, " the": 0.2}, {"0": 0.5, "1": 0.25, "unknown": 0.25}
EXPECTED = {True: (7 * 0.6 + 8 * 0.2) / 0.8, False: 0.25 / 0.75}


def understanding(path, body, n):
    """Active on tokens with an a."""
    return 200, {}, next_token(HIGH if "a" in last_token(body) else LOW, path)


def excerpts_of(tokens, activations=None):
    """One layer with as many neurons as there are lists of texts."""
    tokens = torch.tensor(tokens, dtype=torch.int32)
    activations = torch.zeros(tokens.shape) if activations is None else torch.tensor(activations)
    starts = torch.zeros(tokens.shape[:2], dtype=torch.long)
    return Excerpts(*(value[None] for value in (tokens, activations, starts, starts)))


TEXT = excerpts_of([[[0, 1, 2], [2, 0, NO_TOKEN]], [[0, 0, 1], [NO_TOKEN] * 3]])


def said(*texts, neurons=((0, 0), (0, 1))):
    reasons = [None if text else "never active" for text in texts]
    return TextExplanations(list(neurons[: len(texts)]), list(texts), reasons)


def quiet(cost):
    pass


# simulation


@pytest.mark.parametrize("kind", ["chat", "completions", "completions in the shape of chat"])
def test_a_simulated_activation_is_the_expectation_of_what_the_server_writes(serve, connect, kind):
    def reply(path, body, n):
        return 200, {}, next_token(HIGH if "a" in last_token(body) else LOW, path, modern="shape" in kind)

    server = serve(reply)
    simulator = LanguageModelSimulator(connect(server, chat=kind == "chat"), announce=quiet, top=7)
    simulated = simulator.simulate(said("the letter a", "the same"), TEXT, Words())
    high, low = EXPECTED[True], EXPECTED[False]
    expected = [[[low, high, high], [high, low, 0]], [[low, low, high], [0, 0, 0]]]
    torch.testing.assert_close(simulated, torch.tensor([expected], dtype=torch.float64))
    assert simulator.problems == [{}, {}]
    assert len(server.requests) == 8
    for path, body, _ in server.requests:
        assert path == ("/v1/chat/completions" if kind == "chat" else "/v1/completions")
        assert body["model"] == "tiny" and body["max_tokens"] == 1
        assert (body["top_logprobs"] if kind == "chat" else body["logprobs"]) == 7
        assert "Neuron 2: the " in prompt_of(body)


def test_hostile_tokens_stay_in_their_row(serve, connect):
    server = serve(understanding)
    every = list(range(len(WORDS)))
    simulator = LanguageModelSimulator(connect(server, chat=False, concurrency=1), announce=quiet)
    simulated = simulator.simulate(said("tab\there\n<s>"), excerpts_of([[every]]), Words())
    assert simulated[0, 0, 0].tolist() == pytest.approx([EXPECTED["a" in escape(word)] for word in WORDS])
    *rows, last = server.requests[-1][1]["prompt"].partition("Neuron 2: ")[2].split("\n")
    assert rows[0] == r"tab\there\n<s\>" and len(rows) == len(WORDS) and last == "\t"
    assert [row.split("\t") for row in rows[1:]] == [[escape(word), "unknown"] for word in WORDS[:-1]]
    assert len({escape(word) for word in WORDS}) == len(WORDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb", r"a\tb"),
        ("\r\n", r"\r\n"),
        ("\ud800", r"\ud800"),
        ("\u2028\x00", r"\u2028\x00"),
        ("\\n", r"\\n"),
        ("<|endoftext|>", r"<|endoftext|\>"),
        ("<a><b>", r"<a\><b\>"),
        ("a> <<b c>>", r"a> <<b c\>>"),
        pytest.param("<" * 300_000, "<" * 300_000, id="in linear time"),
        ("a > b -> 漢é ", "a > b -> 漢é "),
    ],
)
def test_escapes(text, expected):
    assert escape(text) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"choices": [{"text": "7", "logpr', "the answer is not JSON"),
        (b"\xff\xfe", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        (b"<html>log in</html>", "the answer is not JSON"),
        ({"choices": []}, "the answer has another shape"),
        ([], "the answer has another shape"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": "high"}]}}]}, "the answer has another shape"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": -(10**400)}]}}]}, "the answer has another shape"),
        ({"choices": [{"logprobs": {"content": []}}]}, "the answer has another shape"),
        ({"choices": [{"text": "7", "logprobs": None}]}, "the answer has no log-probabilities"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": math.nan}]}}]}, "a log-probability that is none"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": 3.0}]}}]}, "a log-probability that is none"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": -math.inf}]}}]}, NO_NUMBER),
        (next_token({" the": 0.9, "10": 0.05, "²": 0.05}), NO_NUMBER),
    ],
)
def test_an_answer_that_says_nothing_is_counted_and_not_guessed(serve, connect, content, reason):
    server = serve(lambda path, body, n: (200, {}, content if last_token(body) == " cat" else next_token(LOW)))
    simulator = LanguageModelSimulator(connect(server, chat=False), announce=quiet)
    simulated = simulator.simulate(said("one", "two"), TEXT, Words())
    low = EXPECTED[False]
    assert simulated[0, :, 0].tolist() == [pytest.approx([low, 0, low]), pytest.approx([low, low, 0])]
    assert simulator.problems == [{reason: 1}, {reason: 1}]


def test_a_kept_answer_of_another_length_is_counted_and_not_guessed(serve, connect, tmp_path):
    """An answer file from elsewhere may hold anything under the right key."""
    server, cache = serve(lambda *request: (200, {}, next_token(LOW))), tmp_path / "answers.sqlite"
    simulator = LanguageModelSimulator(connect(server, chat=False), cache, announce=quiet)
    simulated = simulator.simulate(said("one"), TEXT, Words())
    with contextlib.closing(sqlite3.connect(cache)) as file, file:
        keys = file.execute("SELECT key FROM answers LIMIT 2").fetchall()
        for (key,), odd in zip(keys, ['{"next": []}', "{}"], strict=True):
            file.execute("UPDATE answers SET answer = ? WHERE key = ?", (odd, key))
    again = simulator.simulate(said("one"), TEXT, Words())
    assert int((again == 0).sum()) == int((simulated == 0).sum()) + 2
    assert simulator.problems == [{"the answer says nothing of this place": 2}]


def test_numbers_that_are_almost_impossible_still_have_an_expectation(serve, connect):
    server = serve(lambda *request: (200, {}, {"choices": [{"logprobs": {"top_logprobs": [{"7": -700.0}]}}]}))
    simulator = LanguageModelSimulator(connect(server, chat=False), announce=quiet)
    assert float(simulator.simulate(said("one"), TEXT, Words()).max()) == pytest.approx(7)


def test_no_name_is_no_file_of_answers():
    """SQLite would take it for a file that it removes at the end."""
    with pytest.raises(OSError, match=r"the answers in  cannot be read or written"):
        AnswerCache("")


def test_a_neuron_without_explanation_is_undefined_and_not_asked_about(serve, connect):
    server = serve(understanding)
    simulator = LanguageModelSimulator(connect(server), announce=quiet)
    simulated = simulator.simulate(said("the letter a", None), TEXT, Words())
    assert simulated[0, 1].isnan().all() and not simulated[0, 0].isnan().any() and len(server.requests) == 5
    assert simulator.problems == [{}, {"no explanation: never active": 3}]


def test_ten_is_a_one_followed_by_a_zero(serve, connect):
    """Of the 0.5 for 1, a fifth goes on with 0: 0.1 for 10."""

    def reply(path, body, n):
        if body["prompt"].endswith("\t1"):
            return 200, {}, next_token({"\n": 0.8, "0": 0.2})
        return 200, {}, next_token({"1": 0.5, "2": 0.5} if "a" in last_token(body) else {"10": 0.25, "1": 0.75})

    server = serve(reply)
    simulator = LanguageModelSimulator(connect(server, chat=False), announce=quiet, ten=True)
    simulated = simulator.simulate(said("one"), TEXT, Words())
    high, low = 0.4 * 1 + 0.5 * 2 + 0.1 * 10, 0.25 * 10 + 0.75
    torch.testing.assert_close(simulated[0, 0, 0], torch.tensor([low, high, high], dtype=torch.float64))
    assert len(server.requests) == 5 + 3 and simulator.problems == [{}]
    assert " storm\t10\n" in server.requests[0][1]["prompt"]
    with pytest.raises(ValueError, match="ten needs an endpoint that continues"):
        LanguageModelSimulator(connect(server, chat=True), ten=True)


def test_the_simulation_prompt_leaves_no_activation_to_read_off():
    *pieces, last = simulation_prompt("cats", ["a", "b", "c"])
    assert pieces[0].endswith("Neuron 2: cats\na\t") and pieces[1] == "unknown\nb\t" and last == "unknown\nc\t"
    assert "10" not in pieces[0] and " storm\t9\n" in pieces[0]


def test_a_right_explanation_scores_one(serve, connect):
    tokens = [[[0, 1, 2, 0], [2, 0, 1, NO_TOKEN]]]
    validation = excerpts_of(tokens, [[[0.0, 3.0, 3.0, 0.0], [3.0, 0.0, 3.0, 0.0]]])
    simulator = LanguageModelSimulator(connect(serve(understanding)), announce=quiet)
    simulated = simulator.simulate(said("the letter a"), validation, Words())
    assert float(score(simulated, validation).correlation) == pytest.approx(1)
    undefined = score(simulator.simulate(said(None), validation, Words()), validation)
    assert undefined.correlation.isnan().all() and not undefined.dead.any()


# explanation

STRONG = excerpts_of(
    [[[0, 1, 2], [2, 0, NO_TOKEN]], [[0, 0, 1], [1, 1, 1]], [[0] * 3, [0] * 3]],
    [[[0.0, 2.0, 0.19], [1.99, -3.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]], [[0.0, -1.0, 0.0], [0.0] * 3]],
)


def test_an_explainer_shows_tenths_of_the_maximum_and_takes_the_first_line(serve, connect):
    answers = {" sat\t9": '\n "animals,  mostly" \nBut also', "sun\t0\nsun": "<think>hm</think>the end"}

    def reply(path, body, n):
        mine = prompt_of(body).partition("Neuron 2\n")[2]
        return 200, {}, written(next(answer for row, answer in answers.items() if row in mine))

    server = serve(reply)
    explainer = LanguageModelExplainer(connect(server, concurrency=1), announce=quiet)
    found = explainer.explain(STRONG, Words(), [(0, 0), (0, 2), (0, 1)])
    assert found.texts == ["animals, mostly", None, "the end"]
    assert found.reasons == [None, "never active in its excerpts", None]
    assert len(server.requests) == 2
    first, second = (prompt_of(body).partition("Neuron 2\n")[2] for _, body, _ in server.requests)
    table = "Text 1\nsun\t0\n cat\t10\n sat\t0\nText 2\n sat\t9\nsun\t0\n"
    assert first == table + "In one sentence, neuron 2 responds to:"
    assert second.endswith("Only where it is active\n cat\t10\nIn one sentence, neuron 2 responds to:")  # 1 of 6
    assert server.requests[0][1]["max_tokens"] == 60 and server.requests[0][1]["temperature"] == 0


def test_active_rows_are_repeated_below_a_fifth():
    assert "Only where" not in explanation_prompt([[("x", 1)] + [("y", 0)] * 4])
    assert "Only where it is active\nx\t1\nIn one" in explanation_prompt([[("x", 1)] + [("y", 0)] * 5])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (written(""), "the answer is empty"),
        (written(None), "the answer is empty"),
        (written('""'), "the answer is empty"),
        (written("<think>let me see"), "the answer ends within the model's reasoning: allow more max_tokens"),
        (written(5), "the answer has another shape"),
        ({"choices": [{}]}, "the answer has another shape"),
        (b"{", "the answer is not JSON"),
    ],
)
def test_a_missing_explanation_has_a_reason(serve, connect, content, reason):
    explainer = LanguageModelExplainer(connect(serve(lambda *request: (200, {}, content))), announce=quiet)
    found = explainer.explain(STRONG, Words(), [(0, 0)])
    assert found.texts == [None] and found.reasons == [reason]


def test_explanations_come_back_from_disk(tmp_path):
    found = said("cats \ud800", None)
    found.save(tmp_path / "texts.json")
    assert TextExplanations.load(tmp_path / "texts.json") == found
    (tmp_path / "texts.json").write_text('{"neurons": [3]}')
    with pytest.raises(ValueError, match="holds no explanations"):
        TextExplanations.load(tmp_path / "texts.json")


def test_neurons_are_chosen_in_the_order_asked_and_wrong_ones_named():
    chosen = select_neurons(STRONG, [(0, 2), (0, 0)])
    assert chosen.activations.equal(STRONG.activations[:, [2, 0]]) and chosen.starts.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"below \(1, 3\).*\(0, 3\)"):
        select_neurons(STRONG, [(0, 3)])
    with pytest.raises(ValueError, match="no neuron"):
        select_neurons(STRONG, [])


# the server's bad days


def test_where_there_is_no_stderr_questions_are_asked_all_the_same(serve, connect, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert len(list(ask(connect(serve(understanding), chat=False), [Request(("cat\t",), top=5)]))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": math.nan}, "temperature at least 0"),
        ({"temperature": -1.0}, "temperature at least 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**32}, "seed must be from 0 to"),
    ],
)
def test_wrong_arguments_of_an_explainer_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelExplainer(None, **options)


def test_a_token_that_only_pads_the_vocabulary_is_named(serve, connect):
    server = serve(understanding)
    padded = excerpts_of([[[0, 1, len(WORDS)]]], [[[0.0, 1.0, 0.0]]])
    for ask_it in (
        lambda: LanguageModelExplainer(connect(server), announce=quiet).explain(padded, Words(), [(0, 0)]),
        lambda: LanguageModelSimulator(connect(server), announce=quiet).simulate(said("one"), padded, Words()),
    ):
        with pytest.raises(ValueError, match=f"there is no token {len(WORDS)} in the tokenizer"):
            ask_it()
    assert server.requests == []


def test_overload_and_broken_connections_are_asked_again(serve, connect):
    bad_days = [
        (429, {"Retry-After": 0.3}, {"error": {"message": "slow down"}}),
        (500, {}, b"oops"),
        (200, {"Content-Length": 500}, b'{"choices"'),  # the connection ends too early
        (503, {"Retry-After": "nonsense"}, b""),
    ]
    server = serve(lambda path, body, n: bad_days[n - 1] if n <= len(bad_days) else understanding(path, body, n))
    start = time.monotonic()
    endpoint = connect(server, chat=False)
    assert endpoint.answer(Request(("cat\t",), top=5))["next"][0][0] == [" 7", pytest.approx(math.log(0.6))]
    assert len(server.requests) == 5 and time.monotonic() - start > 0.3


def test_a_slow_answer_is_asked_for_again(serve, connect):
    def reply(path, body, n):
        time.sleep(0.5 if n == 1 else 0)
        return understanding(path, body, n)

    server = serve(reply)
    assert "next" in connect(server, timeout=0.2).answer(Request(("cat\t",), top=5))
    assert len(server.requests) == 2


def test_a_server_that_keeps_failing_ends_the_run(serve, connect):
    server = serve(lambda *request: (500, {}, {"error": {"message": "out of memory"}}))
    with pytest.raises(ConnectionError, match=r"failed 3 times.*HTTP 500: out of memory.*run again"):
        connect(server, retries=2).answer(Request(("cat\t",), top=5))
    assert len(server.requests) == 3
    server = serve(lambda *request: (429, {"Retry-After": "3600"}, b"quota"))
    with pytest.raises(ConnectionError, match=r"failed 1 times.*It asks to wait for 3600 s"):
        connect(server).answer(Request(("cat\t",), top=5))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2", 2),
        ("1e999", math.inf),
        ("Wed, 21 Oct 99999 07:28:00 -9999", 0),
        ("nan", 0),
        ("-1", 0),
        (None, 0),
        ("soon", 0),
        ("inf", math.inf),
        ("Wed, 21 Oct 2015 07:28:00", 0),
    ],
)
def test_retry_after(header, seconds):
    assert endpoints._retry_after(header) == seconds
    assert endpoints._retry_after("Wed, 21 Oct 2065 07:28:00 GMT") > 1e9


def test_refusals_say_what_to_do(serve, connect):
    def reply(path, body, n):
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": "large"}, {"id": "small"}]}
        if body["model"] == "unknown":
            return 404, {}, {"error": {"message": "no such model"}}
        return (400, {}, b"logprobs at most 5") if body.get("top_logprobs") else (401, {}, {"error": "key?"})

    server = serve(reply)
    with pytest.raises(PermissionError, match="Pass a valid api_key"):
        connect(server).answer(Request(("x",)))
    with pytest.raises(ValueError, match=r"of 'unknown': HTTP 404: no such model. Its models: large, small"):
        connect(server, "unknown").answer(Request(("x",)))
    with pytest.raises(ValueError, match="refuses the request: HTTP 400: logprobs at most 5"):
        connect(server).answer(Request(("x",), top=20))
    silent = serve(lambda *request: (404, {}, b"nothing"))
    with pytest.raises(ValueError, match=r"it lists none; does the address end in its version \(/v1\)"):
        connect(silent).answer(Request(("x",)))


def bomb():
    """100 MB of JSON in 100 kB."""
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(b'{"choices": [')] + [packer.compress(b" " * 2**20) for _ in range(100)]
    return b"".join([*parts, packer.compress(b"]}"), packer.flush()])


@pytest.mark.parametrize(
    ("content", "encoding", "problem"),
    [
        (bomb, "gzip", "is longer than"),
        (lambda: b" " * (endpoints.LARGEST_ANSWER + 1), "identity", "is longer than"),
        (lambda: json.dumps(next_token(LOW)).encode(), "gzip", "is not compressed as it says"),
        (lambda: json.dumps(next_token(LOW)).encode(), "br", "compressed in a way that was not asked for"),
        (lambda: gzip.compress(gzip.compress(b"{}")), "gzip, gzip", "compressed in a way that was not asked for"),
        (lambda: gzip.compress(json.dumps(next_token(LOW)).encode())[:-30], "gzip", "is not JSON"),
    ],
)
def test_an_answer_that_is_too_large_or_wrongly_compressed_is_a_problem_and_no_end(
    serve, connect, content, encoding, problem
):
    content = content()
    server = serve(lambda *request: (200, {"Content-Encoding": encoding}, content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = connect(server, chat=False).answer(Request(("cat\t",), top=5))
    assert problem in answer["problem"] and len(server.requests) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 90_000  # kB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[({"base_url": f"http://localhost:{port}/v1"}, "a port that is none") for port in (0, 65536, 99999, -1)],
        *[({"extra": x}, "a dict that JSON can hold") for x in ({"a": math.nan}, {"a": 1, 2: 3}, [1], {"a": {1}})],
    ],
)
def test_an_endpoint_that_could_ask_nobody_is_refused_before_it_asks(given, message):
    with pytest.raises(ValueError, match=message):
        OpenAIEndpoint(**{"base_url": "http://localhost:8000/v1", "model": "m"} | given)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
def test_log_probabilities_that_are_none_are_not_kept(serve, connect, tmp_path, value):
    server = serve(lambda *request: (200, {}, {"choices": [{"logprobs": {"top_logprobs": [{"7": value, "8": -1.0}]}}]}))
    for _ in range(2):
        (answer,) = ask(connect(server, chat=False), [Request(("x\t",), top=5)], tmp_path / "answers.sqlite")
        assert answer == {"problem": "a log-probability that is none"}
    assert len(server.requests) == 2


def test_the_first_requests_of_a_process_may_come_together(serve, connect):
    endpoints._loop.cache_clear()
    endpoint, together = connect(serve(understanding), chat=False), threading.Barrier(8)

    def ask_it(n):
        together.wait(10)
        return endpoint.answer(Request((f"{n} cat\t",), top=5))

    with ThreadPoolExecutor(8) as pool:
        assert all("next" in answer for answer in pool.map(ask_it, range(8)))


def test_closing_twice_is_closing(serve):
    with OpenAIEndpoint(serve(understanding).url, "tiny", chat=False) as endpoint:
        endpoint.answer(Request(("cat\t",), top=5))
        endpoint.close()


def test_a_compressed_answer_is_read(serve, connect):
    content = gzip.compress(json.dumps(next_token(LOW)).encode())
    server = serve(lambda *request: (200, {"Content-Encoding": "gzip"}, content))
    assert connect(server, chat=False).answer(Request(("cat\t",), top=5))["next"][0][0][0] == "0"
    assert server.requests[0][2]["Accept-Encoding"] == "gzip"


def endless(*parts, pause=0.0):
    """A server that sends the first part once and the others over and over, to whoever connects."""
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def send(connection):
        with connection, contextlib.suppress(OSError):
            connection.sendall(parts[0])
            while not over.wait(pause):
                for part in parts[1:]:
                    connection.sendall(part)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=send, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listening, over


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("parts", "pause", "failure"),
    [
        ((HEAD, b"X-More: yes\r\n"), 0.0, "failed 2 times"),
        ((HEAD, b"X"), 0.02, "failed 2 times.*no whole answer in 0.3 s"),
        ((b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), 0.0, "failed 2 times.*no whole answer in 0.3 s"),
        ((b"", b""), 0.02, "failed 2 times.*no whole answer in 0.3 s"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), 0.02, "failed 2 times.*no whole answer"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1"), 0.02, "failed 2 times"),
        ((HEAD + b"Content-Length: 99999999999\r\n\r\n", b" "), 0.02, "failed 2 times.*no whole answer"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * 2**20 + b"\r\n"), 0.0, None),
    ],
)
def test_what_never_ends_is_ended(connect, parts, pause, failure):
    listening, over = endless(*parts, pause=pause)
    endpoint = connect(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.3 if failure else 30, retries=1)
    start = time.monotonic()
    try:
        if failure:
            with pytest.raises(ConnectionError, match=failure):
                endpoint.answer(Request(("x",)))
        else:
            assert "is longer than" in endpoint.answer(Request(("x",)))["problem"]
        assert time.monotonic() - start < 20
    finally:
        over.set()
        listening.close()


def test_what_a_server_writes_shows_neither_secrets_nor_escape_codes(serve, connect):
    evil = "\x1b[31mred\x1b]0;title\x07\u202e\ud800 "

    def reply(path, body, n):
        told = "; ".join((headers := server.requests[-1][2]).get("Authorization", "").split())
        if path == "/v1/models":
            return 200, {}, {"data": [{"id": evil + told}]}
        status = {"unknown": 404, "forbidden": 401, "busy": 500, "moved": 307}.get(body["model"], 400)
        return status, {"Location": "http://elsewhere/" + told}, {"error": {"message": f"{evil}{headers} {told}"}}

    server = serve(reply)
    with_user = server.url.replace("//", "//user:pass-word@")
    for options in ({"api_key": "sk-secret"}, {}):
        url = server.url if options else with_user
        for model in "unknown", "forbidden", "busy", "moved", "other":
            endpoint = connect(url, model, retries=0, **options)
            with pytest.raises((ValueError, OSError)) as raised:
                endpoint.answer(Request(("x",)))
            said = str(raised.value)
            assert said.isprintable() and "[secret]" in said, said
            basic = base64.b64encode(b"user:pass-word").decode()
            assert not any(secret in said for secret in ("sk-secret", "pass-word", basic))
            assert "pass-word" not in endpoint.name and server.url in endpoint.name
    assert server.requests[-1][2]["Authorization"] == f"Basic {basic}"
    assert {path for path, *_ in server.requests} == {
        "/v1/chat/completions",
        "/v1/models",
    }  # no redirection is followed
    for wrong in "two\nlines", "sk-\u2026":
        with pytest.raises(ValueError, match="api_key must be one line of ASCII") as raised:
            connect(server, api_key=wrong)
        assert wrong not in str(raised.value)


def test_an_explanation_holds_only_what_prints(serve, connect):
    server = serve(lambda *request: (200, {}, written("\x1b[2J cats\u202e\ud800 and\tdogs\x07")))
    explainer = LanguageModelExplainer(connect(server), announce=quiet)
    assert explainer.explain(STRONG, Words(), [(0, 0)]).texts == ["[2J cats and dogs"]
    endless = LanguageModelExplainer(connect(serve(lambda *request: (200, {}, written("so " * 10**6)))), announce=quiet)
    assert len(endless.explain(STRONG, Words(), [(0, 0)]).texts[0]) == 2000


def test_nobody_there(connect):
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no server answers at http://127.0.0.1:9/v1.*Is it running"):
        connect("http://127.0.0.1:9/v1", backoff=5).answer(Request(("x",)))
    assert time.monotonic() - start < 4


def test_a_server_that_stops_on_the_way_is_waited_for(serve, connect):
    server = serve(understanding)
    endpoint = connect(server, retries=2)
    endpoint.answer(Request(("x",), top=3))
    endpoint.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ConnectionError, match="failed 3 times"):
        endpoint.answer(Request(("y",), top=3))


def test_the_key_is_sent_and_further_fields_replace(serve, connect, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside\n")
    server = serve(lambda *request: (200, {}, written("yes")))
    extra = {"max_tokens": None, "max_completion_tokens": 9}
    connect(server, extra=extra).answer(Request(("x",), 9, seed=3))
    connect(server, api_key="mine").answer(Request(("x",)))
    (_, body, headers), (_, _, other) = server.requests
    assert "Authorization" not in headers and other["Authorization"] == "Bearer mine"
    openai = OpenAIEndpoint("https://api.openai.com/v1", "m")  # to nobody else goes what the variable holds
    assert openai._client.headers["Authorization"] == "Bearer from-outside"
    assert body == {
        **{"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
        **{"temperature": 1.0, "seed": 3, "max_completion_tokens": 9},
    }


def test_wrong_arguments_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(ValueError, match="must look like http"):
        OpenAIEndpoint("localhost:8000", "m")
    with pytest.raises(ValueError, match="concurrency >= 1"):
        OpenAIEndpoint("http://localhost", "m", concurrency=0)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r"pip install 'cratelab\[interpret\]'"):
        OpenAIEndpoint("http://localhost", "m")


def test_a_useless_server_is_not_asked_to_the_end(serve, connect):
    server = serve(lambda *request: (200, {}, b"<html>"))
    simulator = LanguageModelSimulator(connect(server, concurrency=2), announce=quiet)
    with pytest.raises(ValueError, match=r"the first 20 answers .* of no use \(the answer is not JSON\)"):
        simulator.simulate(said("one"), excerpts_of([[[0, 1, 2] * 40]]), Words())
    assert len(server.requests) < 60


# cost and cache


def test_no_question_is_asked_twice(serve, connect, tmp_path):
    server = serve(understanding)
    cache = tmp_path / "folder" / "answers.sqlite"
    simulator = LanguageModelSimulator(connect(server), cache, announce=quiet)
    first = simulator.simulate(said("one"), TEXT, Words())
    assert len(server.requests) == 5
    second = LanguageModelSimulator(connect(server), cache, announce=quiet).simulate(said("one"), TEXT, Words())
    assert len(server.requests) == 5 and second.equal(first)
    LanguageModelSimulator(connect(server, "other"), cache, announce=quiet).simulate(said("one"), TEXT, Words())
    assert len(server.requests) == 10


def test_problems_are_asked_again_in_the_next_run(serve, connect, tmp_path):
    server = serve(lambda path, body, n: (200, {}, b"{") if n <= 2 else understanding(path, body, n))
    simulator = LanguageModelSimulator(connect(server), tmp_path / "answers", announce=quiet)
    simulator.simulate(said("one"), TEXT, Words())
    assert sum(simulator.problems[0].values()) == 2
    simulator.simulate(said("one"), TEXT, Words())
    assert simulator.problems == [{}] and len(server.requests) == 7


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
    assert answer["next"][0][0][0] == " 7"


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


def test_the_cost_is_known_and_announced_before_anything_is_sent(serve, connect, tmp_path, capsys):
    server, cache = serve(understanding), tmp_path / "answers"
    simulator = LanguageModelSimulator(connect(server), cache, prices=(2.0, 10.0))
    cost = simulator.estimate_cost(said("one", "two"), TEXT, Words())
    assert (cost.requests, cost.cached, cost.completion_tokens) == (8, 0, 8)
    assert server.requests == [] and not cache.exists()
    simulator.simulate(said("one", "two"), TEXT, Words())
    assert len(server.requests) == 8 and capsys.readouterr().out == f"{cost}\n"
    texts = [prompt_of(body) for _, body, _ in server.requests]
    assert cost.prompt_tokens == sum(map(simulator.endpoint.count_tokens, texts))
    assert 0.7 < cost.prompt_tokens / sum(len(text) / 4 for text in texts) < 1.5
    assert cost.money == pytest.approx((cost.prompt_tokens * 2 + 8 * 10) / 1e6)
    assert simulator.estimate_cost(said("one", "two"), TEXT, Words()).cached == 8
    assert str(Cost(1000, 2, 3_000_000, 4, (1.0, 5.0))) == (
        "1,000 requests (2 more are cached), about 3,000,000 prompt tokens, at most 4 completion tokens: "
        "3.00 at 1.0 and 5.0 a million"
    )
    explainer = LanguageModelExplainer(connect(server))
    cost = explainer.estimate_cost(STRONG, Words(), [(0, 0), (0, 2)])
    assert (cost.requests, cost.completion_tokens, cost.money) == (1, 60, None)


def test_whoever_hears_the_cost_may_stop_it(serve, connect):
    def too_much(cost):
        raise KeyboardInterrupt

    server = serve(understanding)
    with pytest.raises(KeyboardInterrupt):
        LanguageModelSimulator(connect(server), announce=too_much).simulate(said("one"), TEXT, Words())
    assert server.requests == []


# a model on this machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama over bytes, with a token of its own for a tab and the u after it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tab = tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str("\t")[0][0]
    words = {character: i for i, character in enumerate([*alphabet, tab + "u"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(words, [(tab, "u")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}[[{{ m['content'] }}]]{% endfor %}"
    config = transformers.LlamaConfig(
        **dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2),
        **dict(num_attention_heads=2, max_position_embeddings=1500, bos_token_id=None, eos_token_id=257),
        initializer_range=0.5,
    )
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def local(folder):
    return HuggingFaceEndpoint(folder, device="cpu")


def test_one_forward_pass_is_one_pass_a_token(local):
    """Against the model's own logits after each prefix, tokenised byte by byte but for the joined rows."""
    simulator = LanguageModelSimulator(local, announce=quiet, top=300)
    assert simulator.estimate_cost(said("one"), TEXT, Words()).requests == 2
    simulated = simulator.simulate(said("one"), TEXT, Words())
    digits = [local.tokenizer(str(n))["input_ids"][0] for n in range(10)]
    for excerpt, words in enumerate([["sun", " cat", " sat"], [" sat", "sun"]]):
        pieces = simulation_prompt("one", words)
        for i in range(len(words)):
            ids = [token for piece in pieces[: i + 1] for token in local.tokenizer(piece)["input_ids"]]
            assert local.tokenizer.decode(ids[-1:]) == "\t"
            with torch.no_grad():
                p = local.model(torch.tensor([ids])).logits[0, -1].double()[digits].softmax(0)
            assert float(simulated[0, 0, excerpt, i]) == pytest.approx(float(p @ torch.arange(10.0).double()), rel=1e-4)
    assert simulated[0, 0, 1, 2] == 0 and simulator.problems == [{}]


# all places of an excerpt in one request, by HTTP


def one_by_one(tokenizer, text):
    """Every byte is a token: parts of a character decode to U+FFFD."""
    return [
        tokenizer.convert_tokens_to_ids(token)
        for token in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    ]


def whole(tokenizer, text):
    return tokenizer(text)["input_ids"]


def speak(local, encode=one_by_one, bos=(), offset=None, change=None):
    """A server of the API over this model: `change(choice, n)` what it does wrong."""
    tokenizer = local.tokenizer

    def likeliest(row, following, k):
        best = row.topk(min(k, len(row)))
        pairs = zip([*best.indices.tolist(), following], [*best.values.tolist(), float(row[following])], strict=True)
        return {tokenizer.decode([token]): value for token, value in pairs}

    def reply(path, body, n):
        ids = [*bos, *encode(tokenizer, body["prompt"])]
        with torch.no_grad():
            rows = local.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids.append(int(rows[-1].argmax()))
        tokens = [tokenizer.decode([token]) for token in ids]
        following = [likeliest(row, token, body["logprobs"]) for row, token in zip(rows, ids[1:], strict=True)]
        held = {
            "tokens": tokens,
            "top_logprobs": [None, *following],
            "text_offset": [sum(map(len, tokens[:i])) if offset is None else offset for i in range(len(tokens))],
        }
        held = held if body.get("echo") else {name: values[-1:] for name, values in held.items()}
        choice = {"index": 0, "text": "".join(held["tokens"]), "logprobs": held, "finish_reason": "length"}
        if change and body.get("echo"):
            choice = change(choice, n)
        return (200, {}, {"choices": [choice]}) if isinstance(choice, dict) else choice

    return reply


def read_directly(local, explanation, tokens, encode=one_by_one, bos=()):
    """The expectation after every prefix of a prompt, from the logits of the model."""
    digits = [local.tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)]
    pieces, expected = simulation_prompt(explanation, [escape(WORDS[token]) for token in tokens]), []
    for i in range(len(pieces)):
        ids = [*bos, *encode(local.tokenizer, "".join(pieces[: i + 1]))]
        with torch.no_grad():
            p = local.model(torch.tensor([ids])).logits[0, -1].double()[digits].softmax(0)
        expected.append(float(p @ torch.arange(10.0).double()))
    return pytest.approx(expected, rel=1e-4)


STRANGE = [0, 6, 9, 12, 2]  # among them a special token, one that is three tokens here, and one of no letters


@pytest.mark.parametrize(("bos", "offset"), [((), None), ((257,), None), ((), -1)])
def test_an_excerpt_is_one_request_where_the_server_repeats_prompts(serve, connect, local, bos, offset):
    """As vLLM, whose offsets count the special token, and SGLang, which has none."""
    server = serve(speak(local, bos=bos, offset=offset))
    simulator = LanguageModelSimulator(connect(server, chat=False, echo=True), announce=quiet, top=300)
    excerpts = excerpts_of([[STRANGE, [2, 0, 1, NO_TOKEN, NO_TOKEN]]])
    simulated = simulator.simulate(said("one"), excerpts, Words())
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", STRANGE, bos=bos)
    assert simulated[0, 0, 1, :3].tolist() == read_directly(local, "one", [2, 0, 1], bos=bos)
    assert simulator.problems == [{}] and len(server.requests) == 2 + 2
    assert [body.get("echo") for _, body, _ in server.requests] == [None, True, True, True]
    assert all(body["max_tokens"] == 1 for _, body, _ in server.requests)


def refuse(status, message):
    return lambda choice, n: (status, {}, {"error": {"message": message}})


def spoil(choice, **changed):
    return choice | {"logprobs": choice["logprobs"] | changed}


def without(choice, n):
    return spoil(choice, top_logprobs=[None] * len(choice["logprobs"]["tokens"]))


def cut(choice, n):
    return spoil(choice, top_logprobs=choice["logprobs"]["top_logprobs"][:200])


def cut_prompt(choice, n):
    return choice | {"logprobs": {name: values[-40:] for name, values in choice["logprobs"].items()}}


def shift(choice, n):
    """As llama-cpp-python does for models that have no token at the beginning."""
    return spoil(choice, top_logprobs=[*choice["logprobs"]["top_logprobs"][1:], {}])


def ignore(choice, n):
    return choice | {"logprobs": {name: values[-1:] for name, values in choice["logprobs"].items()}}


def shift_by_a_row(choice, n):
    """Something with a tab before the prompt."""
    tokens, following = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
    return spoil(choice, tokens=["\t", *tokens], top_logprobs=[None, *following])


def ids_for_tokens(choice, n):
    return spoil(choice, tokens=[f"token_id:{len(token)}" for token in choice["logprobs"]["tokens"]])


PLACES = "does not repeat the prompt with a token that ends at each place"
NONE = "the answer has no log-probabilities"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (refuse(400, "Setting 'echo' and 'logprobs' at the same time is not supported"), "HTTP 400: Setting 'echo'"),
        (refuse(500, "Only no echo is supported"), "HTTP 500: Only no echo"),
        (refuse(403, "not for you"), "HTTP 403: not for you"),
        (lambda choice, n: choice | {"logprobs": None}, NONE),
        (without, NONE),
        (ignore, PLACES),
        (cut, PLACES),
        (cut_prompt, PLACES),
        (shift_by_a_row, PLACES),
        (ids_for_tokens, PLACES),
        (lambda choice, n: choice | {"logprobs": {"content": []}}, "the answer has another shape"),
        (lambda choice, n: spoil(choice, tokens=7), "the answer has another shape"),
        (lambda choice, n: (200, {}, b"{"), "the answer is not JSON"),
        (shift, "they differ from those of the same place"),
    ],
)
def test_a_server_that_does_not_repeat_prompts_rightly_is_asked_for_each_token(serve, connect, local, change, reason):
    server, told = serve(speak(local, change=change)), []
    endpoint = connect(server, chat=False, echo=True)
    simulator = LanguageModelSimulator(endpoint, announce=told.append, top=300)
    with pytest.warns(UserWarning, match=rf"{reason}.*so every token is a request. echo=False does not try"):
        simulated = simulator.simulate(said("one"), excerpts_of([[[0, 1, 2]]]), Words())
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", [0, 1, 2])
    tried = 4 if "500" in reason else 2  # what fails is tried again
    assert told[0].requests == 3 and len(server.requests) == tried + 3 and not server.requests[-1][1].get("echo")


def test_a_tokenizer_that_joins_the_tab_to_what_follows_is_asked_for_each_token(serve, connect, local):
    server = serve(speak(local, whole))
    simulator = LanguageModelSimulator(connect(server, chat=False, echo=True), announce=quiet, top=300)
    with pytest.warns(UserWarning, match=PLACES):
        simulated = simulator.simulate(said("one"), excerpts_of([[[0, 1, 2]]]), Words())
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", [0, 1, 2], whole)


@pytest.mark.parametrize(
    ("change", "reason"), [(without, NONE), (cut, f"the answer {PLACES}"), (ignore, f"the answer {PLACES}")]
)
def test_an_excerpt_whose_answer_is_spoilt_is_counted_and_not_guessed(serve, connect, local, tmp_path, change, reason):
    """Of two excerpts the second, in the first run; it is asked for again in the next."""
    server = serve(speak(local, change=lambda choice, n: change(choice, n) if n == 4 else choice))
    endpoint = connect(server, chat=False, echo=True, concurrency=1)
    simulator = LanguageModelSimulator(endpoint, tmp_path / "answers", announce=quiet, top=300)
    excerpts = excerpts_of([[[0, 1, 2], [2, 2, NO_TOKEN]]])
    simulated = simulator.simulate(said("one"), excerpts, Words())
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", [0, 1, 2])
    assert simulated[0, 0, 1].tolist() == [0, 0, 0] and simulator.problems == [{reason: 2}]
    again = simulator.simulate(said("one"), excerpts, Words())
    assert again[0, 0, 1, :2].tolist() == read_directly(local, "one", [2, 2])
    assert again[0, 0, 0].equal(simulated[0, 0, 0]) and simulator.problems == [{}] and len(server.requests) == 2 + 2 + 1


def test_a_place_without_a_number_is_counted_alone(serve, connect, local):
    def change(choice, n):
        rows = [
            row and {t: p for t, p in row.items() if t not in "0123456789"}
            for row in choice["logprobs"]["top_logprobs"]
        ]
        first = [i for i, token in enumerate(choice["logprobs"]["tokens"], 1) if token == "\t"][-3]
        kept = choice["logprobs"]["top_logprobs"]
        return choice if n < 3 else spoil(choice, top_logprobs=[*kept[:first], rows[first], *kept[first + 1 :]])

    simulator = LanguageModelSimulator(
        connect(serve(speak(local, change=change)), chat=False, echo=True), announce=quiet, top=300
    )
    simulated = simulator.simulate(said("one"), excerpts_of([[[0, 1, 2]]]), Words())[0, 0, 0].tolist()
    assert simulated[0] == 0 and [0, *simulated[1:]] != simulated[:1] * 3 and simulator.problems == [{NO_NUMBER: 1}]
    assert simulated[1:] == pytest.approx(read_directly(local, "one", [0, 1, 2]).expected[1:], rel=1e-4)


def test_ten_is_read_likewise_from_repeated_prompts(serve, connect, local):
    server, found = serve(speak(local)), {}
    for echo in (True, False):
        endpoint = connect(server, chat=False, echo=echo)
        simulator = LanguageModelSimulator(endpoint, announce=quiet, top=300, ten=True)
        found[echo] = simulator.simulate(said("one"), excerpts_of([[[0, 1, 2]]]), Words())
        assert simulator.problems == [{}]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=0)
    assert len(server.requests) == (2 + 1 + 3) + (3 + 3)


def test_the_cost_is_that_of_the_mode_that_will_be_used(serve, connect, local, tmp_path):
    server, cache, told = serve(speak(local)), tmp_path / "answers", []

    def stop(cost):
        told.append(cost)
        raise KeyboardInterrupt

    endpoint = connect(server, chat=False, echo=True)
    with pytest.raises(KeyboardInterrupt):
        LanguageModelSimulator(endpoint, cache, (2.0, 10.0), stop, top=9).simulate(said("one", "two"), TEXT, Words())
    assert len(server.requests) == 2  # the trial
    simulator = LanguageModelSimulator(endpoint, cache, (2.0, 10.0), told.append, top=9)
    simulator.simulate(said("one", "two"), TEXT, Words())
    texts = [body["prompt"] for _, body, _ in server.requests[2:]]
    assert told[0] == told[1] == Cost(3, 0, sum(map(endpoint.count_tokens, texts)), 3, (2.0, 10.0))
    assert len(texts) == 3 and told[0].money == pytest.approx((told[0].prompt_tokens * 2 + 3 * 10) / 1e6)
    LanguageModelSimulator(connect(server, chat=False, echo=True), cache, announce=told.append, top=9).simulate(
        said("one", "two"), TEXT, Words()
    )
    assert told[2].cached == 3 and len(server.requests) == 5 + 2  # nothing but another trial
    each = LanguageModelSimulator(connect(server, chat=False), announce=quiet)
    assert each.estimate_cost(said("one", "two"), TEXT, Words()).requests == 8 and len(server.requests) == 7


def test_only_a_model_that_continues_texts_is_tried_and_a_dead_server_is_no_answer(serve, connect):
    server = serve(understanding)
    assert not connect(server, chat=True, echo=True).all_at_once and not connect(server, chat=False).all_at_once
    assert server.requests == []
    with pytest.raises(ConnectionError, match="no server answers"):
        connect("http://127.0.0.1:9/v1", chat=False, echo=True).all_at_once  # noqa: B018
    unknown = serve(lambda *request: (404, {}, {"error": {"message": "no such model"}}))
    with pytest.raises(ValueError, match="no such model"):
        connect(unknown, chat=False, echo=True).all_at_once  # noqa: B018


def test_a_local_model_splits_ten_and_counts_places_without_numbers(local):
    simulator = LanguageModelSimulator(local, announce=quiet, top=300, ten=True)
    simulated = simulator.simulate(said("one"), TEXT, Words())
    assert (simulated[TEXT.tokens[:, :1] != NO_TOKEN] > 0).all() and (simulated <= 10).all()
    few = LanguageModelSimulator(local, announce=quiet, top=1)
    found = few.simulate(said("one"), TEXT, Words())
    assert few.problems[0][NO_NUMBER] == int((found == 0).sum()) - 1


def test_a_local_model_writes(local, folder):
    explainer = LanguageModelExplainer(local, announce=quiet, max_tokens=12, temperature=1.0, seed=1)
    state = torch.random.get_rng_state()
    found = explainer.explain(STRONG, Words(), [(0, 0)])
    assert found.texts[0] and torch.random.get_rng_state().equal(state)
    assert explainer.explain(STRONG, Words(), [(0, 0)]) == found
    request = Request(("hello",), 5, temperature=0.0)
    assert local.answer(request) == local.answer(request)
    local.chat = True
    assert local.tokenizer.decode(local._encode(request)[0]) == "[[hello]]"
    local.chat = False
    with pytest.raises(ValueError, match=r"the prompt is 1600 tokens, the context of .* 1500: take fewer"):
        local.answer(Request(("x" * 1600,), top=5))


def copied(folder, path):
    return Path(shutil.copytree(folder, path))


def change_weights(path):
    file = path / "model.safetensors"
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_template(path):
    file = path / "chat_template.jinja"
    file.write_text(file.read_text().replace("[[", "(("))


def test_the_name_of_a_local_model_is_that_of_all_that_decides_its_answers(local, folder, tmp_path):
    assert str(folder) in local.name
    path = copied(folder, tmp_path / "copy")
    names = [HuggingFaceEndpoint(path, device="cpu").name]
    (path / "README.md").write_text("a note")
    os.utime(path / "model.safetensors")
    assert HuggingFaceEndpoint(path, device="cpu").name == names[0]
    for change in change_weights, change_template:
        change(path)
        names.append(HuggingFaceEndpoint(path, device="cpu").name)
    assert len(set(names)) == 3


def edit_config(**changed):
    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changed))

    return edit


def with_code(path):
    (path / "evil.py").write_text("raise SystemExit('it ran')")
    edit_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(path)


def without_a_weight(path):
    tensors = storage.read_tensors(path / "model.safetensors")
    storage.write_tensors(path / "model.safetensors", dict(list(tensors.items())[1:]), {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_config(num_hidden_layers=10**8), "more than its weights hold: num_hidden_layers"),
        (edit_config(vocab_size=10**8), "more than its weights hold: vocab_size"),
        (edit_config(num_hidden_layers=3), "lack"),
        (edit_config(hidden_size=None), "no causal language model"),
        (edit_config(num_hidden_layers="two"), "no causal language model"),
        (without_a_weight, "lack"),
        (with_code, "no causal language model"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 99), "is no safetensors file"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json must hold a JSON object"),
    ],
)
def test_a_local_model_that_is_not_whole_is_refused_by_name(folder, tmp_path, spoil, message):
    path = copied(folder, tmp_path / "copy")
    spoil(path)
    with pytest.raises(ValueError, match=message) as raised:
        HuggingFaceEndpoint(path, device="cpu")
    assert str(path) in str(raised.value)


def test_a_local_model_whose_weights_are_not_finite_has_problems_and_no_end(folder, tmp_path):
    path = copied(folder, tmp_path / "copy")
    tensors = storage.read_tensors(path / "model.safetensors")
    spoilt = {name: tensor * torch.nan for name, tensor in tensors.items()}
    storage.write_tensors(path / "model.safetensors", spoilt, {"format": "pt"})
    endpoint = HuggingFaceEndpoint(path, device="cpu")
    assert "the model cannot write" in endpoint.answer(Request(("cat",), 5))["problem"]
    simulator = LanguageModelSimulator(endpoint, announce=quiet)
    assert not simulator.simulate(said("one"), TEXT, Words()).any()
    assert simulator.problems == [{"a log-probability that is none": 5}]


def test_an_empty_prompt_is_refused(local):
    with pytest.raises(ValueError, match="no token"):
        local.answer(Request(("",), top=5))


def test_only_safe_folders_are_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        HuggingFaceEndpoint(tmp_path / "missing")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in Path(folder).glob("*.json"):
        (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing is ever unpickled"):
        HuggingFaceEndpoint(pickled)
    (pickled / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no causal language model that transformers loads"):
        HuggingFaceEndpoint(pickled)
    config = json.loads((pickled / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Mine", "AutoConfig": "code.Config"}}
    (pickled / "config.json").write_text(json.dumps(config))
    (pickled / "code.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ValueError, match="no causal language model that transformers loads"):
        HuggingFaceEndpoint(pickled)
