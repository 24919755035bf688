import base64
import contextlib
import gzip
import json
import math
import resource
import socket
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from language_model_server import LOW, next_token, understanding, written

from cratelab.interpret.asking import endpoints
from cratelab.interpret.asking.endpoints import OpenAIEndpoint, Request


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
    assert endpoint.answer(Request(("cat\t",), top=5))["next"][0][0] == ["7", pytest.approx(math.log(0.6))]
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
