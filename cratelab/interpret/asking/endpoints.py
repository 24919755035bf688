"""Language models that answer requests, and those that do so over HTTP with OpenAI's API.

Hosted models speak it, and so do vLLM, llama.cpp, Ollama and others. HTTP is left to httpx2, the maintained
continuation of httpx: it knows proxies and the system's certificates, and comes with huggingface_hub anyway. The
`openai` package is built on it too, and would take only the retries off our hands.

A server may send anything for as long as it likes, so that a request has a deadline as a whole, its answer a size that
it may not pass, and what is shown of it neither secrets nor characters that do not print.
"""

import asyncio
import base64
import json
import math
import os
import random
import re
import threading
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from typing import NamedTuple, Protocol, Self

from cratelab.extras import require
from cratelab.interpret.asking.prompts import drop_unprintable, simulation_prompt
from cratelab.interpret.asking.replies import Answer, only_numbers, read_echoed, read_next, read_text
from cratelab.storage import digest_of

LONGEST_WAIT = 300.0  # seconds; a server that asks for more is given up, since a run can be taken up again later
LARGEST_ANSWER = 2**24  # bytes, decompressed; the log-probabilities of a prompt of 8,000 tokens are about as many


@dataclass(frozen=True)
class Request:
    """One question to a language model.

    Attributes:
        prompt: pieces of text, joined without a space; endpoints that are not `all_at_once` take one. Where there are
            several, each ends with a tab.
        max_tokens: how long the answer may be.
        top: 0 asks for text; else for the numbers 0 to 10 among this many of the likeliest next tokens after each
            piece. An endpoint that sees all tokens looks at all, whatever `top` is.
        temperature: of sampled text; 0 takes the likeliest token.
        seed: of the sampling, where the endpoint has one.
    """

    prompt: tuple[str, ...]
    max_tokens: int = 1
    top: int = 0
    temperature: float = 1.0  # servers that scale their log-probabilities then leave them as they are
    seed: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.prompt)

    def key(self, model: str) -> str:
        """SHA-256 of the request and the model's name: what its answer is kept under."""
        return digest_of([model, asdict(self)])


class Endpoint(Protocol):
    """Something that answers requests.

    Attributes:
        name: of the model and all settings that change its answers.
        concurrency: how many requests it takes at a time.
        all_at_once: whether it reads the next tokens after all pieces of a prompt in one request.
        continues: whether it continues a text; else it replies to it.
    """

    name: str
    concurrency: int
    all_at_once: bool
    continues: bool

    def answer(self, request: Request) -> Answer:
        """The answer, or `{"problem": reason}` if what came cannot be used; raises what concerns all requests."""

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt is, about."""


class OpenAIEndpoint:
    """A server that speaks OpenAI's API.

    Overload, time-outs and broken connections are tried again with exponential back-off, or when `Retry-After` says.
    Redirections are not followed. Use as a context manager, or `close` it.

    Args:
        base_url: up to the version, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`. A user's name
            and password in it are sent, and never shown or kept.
        model: the name that the server gives it.
        api_key: sent as bearer token. Unless given, the variable OPENAI_API_KEY, to api.openai.com alone.
        chat: ask /chat/completions, for models that reply; False asks /completions, for models that continue a text.
        concurrency: requests at a time.
        timeout: seconds that a request may take, from the connection to the end of the answer.
        retries: how often a request is repeated at most.
        backoff: seconds before the first repetition, doubled with each.
        echo: ask /completions to repeat a prompt with its log-probabilities, if a trial shows that the server does so
            rightly; False does not try.
        extra: further fields of every request, such as {"max_completion_tokens": 60}; None takes a field out.

    Raises:
        ImportError: httpx2 is not installed.
        ValueError: `base_url` is no HTTP address, `api_key` no line of ASCII, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        chat: bool = True,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 1.0,
        echo: bool = True,
        extra: dict | None = None,
    ):
        if not re.match("https?://[^/]", base_url):
            raise ValueError(f"base_url must look like http://localhost:8000/v1; got {without_user(base_url)!r}")
        if concurrency < 1 or retries < 0 or not timeout > 0 or not backoff >= 0:
            raise ValueError(
                "OpenAIEndpoint needs concurrency >= 1, timeout > 0, retries >= 0 and backoff >= 0; "
                f"got {concurrency}, {timeout}, {retries}, {backoff}"
            )
        try:
            json.dumps(dict(extra or {}), allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must be a dict that JSON can hold; got {extra!r}: {error}") from error
        self._http = require("httpx2", "interpret")
        try:
            url = self._http.URL(base_url)
        except self._http.InvalidURL as error:
            raise ValueError(f"base_url {without_user(base_url)!r} is no address: {error}") from None
        if not 0 < (1 if url.port is None else url.port) < 2**16:
            raise ValueError(f"base_url {without_user(base_url)!r} names a port that is none")
        if url.query or url.fragment:
            raise ValueError(f"base_url must end in the version, without ? or #; got {without_user(base_url)!r}")
        self.url = str(url.copy_with(userinfo=b"")).rstrip("/")
        self.model, self.chat, self.concurrency = model, chat, concurrency
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.extra, self.continues, self.echo = extra or {}, not chat, echo and not chat
        self.name = json.dumps([self.url, model, chat, self.extra], sort_keys=True)
        is_openai = base_url.startswith("https://api.openai.com/")  # nobody else is sent what the variable holds
        key = (api_key or (os.environ.get("OPENAI_API_KEY", "") if is_openai else "")).strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError("api_key must be one line of ASCII characters")
        basic = base64.b64encode(f"{url.username}:{url.password}".encode()).decode() if url.userinfo else ""
        self._secrets = [secret for secret in (key, url.password, basic) if secret]
        sent = f"Basic {basic}" if basic else f"Bearer {key}" if key else None
        self._client = self._http.AsyncClient(
            headers={"Accept-Encoding": "gzip"} | ({"Authorization": sent} if sent else {}),
            timeout=self._http.Timeout(None, connect=timeout / 2),
            limits=self._http.Limits(max_connections=concurrency),
        )
        self._reached, self._loop = threading.Event(), _loop()
        self._shift = 0  # by how many tokens the log-probabilities of a repeated prompt come early

    @cached_property
    def all_at_once(self) -> bool:
        """Whether a prompt's own log-probabilities can be read; tried out, once, with two requests.

        The same place is read with `echo` and as what follows the prompt. Where the server shifts them by a token, and
        they agree once that is undone, all answers are read so. Some servers refuse `echo`, ignore it, leave the
        log-probabilities out or give others; all these are warned of.

        Raises:
            ConnectionError: there is no server; the rest as `answer`.
        """
        if not self.echo:
            return False
        pieces = tuple(simulation_prompt("numbers", ["one", " two"]))
        first, both = Request(pieces[:1], top=5), Request(pieces, top=5)
        alone = self._read(self._send(first, self.retries), first)
        try:
            reply = self._send(both, min(self.retries, 2))  # a refusal may look like a failure
            problem = alone.get("problem") or _differs(alone, self._read(reply, both))
            if problem and "next" in alone and not _differs(alone, self._read(reply, both, shift=1)):
                self._shift, problem = 1, None
        except (ValueError, OSError) as error:
            problem = alone.get("problem") or str(error)
        if problem:
            warnings.warn(
                f"{self.url} does not give the log-probabilities of prompts ({problem}), so every token is a request. "
                "echo=False does not try",
                stacklevel=3,  # past cached_property
            )
        return not problem

    def answer(self, request: Request) -> Answer:
        """Ask, again if need be, and read what comes: text, or for each piece the numbers that may follow.

        Raises:
            PermissionError: the key is missing, wrong or not allowed this.
            ConnectionError: there is no server, or it keeps failing.
            ValueError: it does not know the model or refuses the request.
        """
        answer = self._read(self._send(request, self.retries), request, self._shift)
        return {"next": list(map(only_numbers, answer["next"]))} if "next" in answer else answer

    def count_tokens(self, text: str) -> int:
        """An estimate that needs no tokenizer: a token for each 8 letters of a word, 3 digits, or other character."""
        return len(re.findall(r"[^\W\d_]{1,8}|\d{1,3}|[^\w ]|_", text))

    def close(self) -> None:
        """Close the connections."""
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _send(self, request: Request, retries: int) -> "_Reply":
        body = {"model": self.model, "max_tokens": request.max_tokens, "temperature": request.temperature}
        body |= {"messages": [{"role": "user", "content": request.text}]} if self.chat else {"prompt": request.text}
        if request.top:
            body |= {"logprobs": True, "top_logprobs": request.top} if self.chat else {"logprobs": request.top}
        if len(request.prompt) > 1:
            body["echo"] = True
        body = {
            name: value for name, value in ({"seed": request.seed} | body | self.extra).items() if value is not None
        }
        return self._post("/chat/completions" if self.chat else "/completions", body, retries)

    def _read(self, reply: "_Reply", request: Request, shift: int = 0) -> Answer:
        try:
            held = json.loads(reply.read())
        except _UselessError as error:
            return {"problem": str(error)}
        except (ValueError, RecursionError):
            return {"problem": "the answer is not JSON"}
        try:
            choice = held["choices"][0]
            if len(request.prompt) > 1:
                return read_echoed(choice, request.prompt, shift)
            return read_next(choice) if request.top else read_text(choice)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            return {"problem": "the answer has another shape"}

    def _post(self, path: str, body: dict, retries: int) -> "_Reply":
        for attempt in range(retries + 1):
            wait = self.backoff * 2.0 ** min(attempt, 99) * random.uniform(0.75, 1)  # threads do not return together
            try:
                reply = self._exchange("POST", path, body)
            except (self._http.ConnectError, self._http.ConnectTimeout) as error:
                failure = self._printable(repr(error))
                if not self._reached.is_set():
                    raise ConnectionError(
                        f"no server answers at {self.url}: {failure}. Is it running, and is this its address?"
                    ) from error
            except TimeoutError:
                failure = f"no whole answer in {self.timeout:g} s"
            except self._http.HTTPError as error:
                failure = self._printable(repr(error))
            else:
                self._reached.set()
                if reply.status == 200:
                    return reply
                failure = f"HTTP {reply.status}: {self._message(reply)}"
                if reply.status not in (408, 409, 425, 429) and reply.status < 500:
                    raise self._refusal(reply.status, failure)
                wait = max(wait, _retry_after(reply.headers.get("Retry-After")))
            if attempt == retries or wait > LONGEST_WAIT:
                break
            time.sleep(wait)
        asked = f" It asks to wait for {wait:.0f} s." if wait > LONGEST_WAIT else ""
        raise ConnectionError(
            f"{self.url} failed {attempt + 1} times, at last with {failure}.{asked} Cached answers are kept: run again "
            "later, or with a lower concurrency"
        )

    def _exchange(self, method: str, path: str, body: dict | None = None) -> "_Reply":
        """One request and what comes, in `timeout` seconds and `LARGEST_ANSWER` bytes."""

        async def exchange() -> _Reply:
            content = None if body is None else json.dumps(body, allow_nan=False).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            async with (
                asyncio.timeout(self.timeout),
                self._client.stream(method, self.url + path, content=content, headers=headers) as response,
            ):
                reply = _Reply(response.status_code, response.headers, bytearray())
                async for part in response.aiter_raw():
                    reply.content.extend(part)
                    if len(reply.content) > LARGEST_ANSWER:
                        break
                return reply

        return asyncio.run_coroutine_threadsafe(exchange(), self._loop).result()

    def _refusal(self, status: int, failure: str) -> Exception:
        if status in (401, 403):
            return PermissionError(f"{self.url} refuses: {failure}. Pass a valid api_key")
        if status != 404:
            return ValueError(f"{self.url} refuses the request: {failure}")
        try:
            listed = json.loads(self._exchange("GET", "/models").read())["data"]
            known = [self._printable(str(entry["id"])) for entry in listed[:100]]
        except (self._http.HTTPError, TimeoutError, ValueError, LookupError, TypeError, RecursionError):
            known = []
        return ValueError(
            f"{self.url} has no {'chat ' * self.chat}completions of {self.model!r}: {failure}. "
            f"Its models: {', '.join(known) or 'it lists none; does the address end in its version (/v1)?'}"
        )

    def _message(self, reply: "_Reply") -> str:
        """What the server says went wrong, in OpenAI's shape or any other."""
        if 300 <= reply.status < 400:
            where = self._printable(reply.headers.get("Location", ""))
            return f"it sends to {where!r}, which is not followed: if that is right, make it the base_url"
        try:
            content = reply.read()
        except _UselessError as error:
            return str(error)
        try:
            return self._printable(str(json.loads(content)["error"]["message"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            return self._printable(content.decode("utf8", "replace"))

    def _printable(self, text: str) -> str:
        """What a server wrote, to be shown: without secrets, and nothing but characters that print."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return drop_unprintable(text)[:500]


class _UselessError(ValueError):
    """An answer that cannot be read, though the server may answer other requests."""


class _Reply(NamedTuple):
    """What came of one request: its content as it was sent, cut off where it is too long."""

    status: int
    headers: Mapping[str, str]
    content: bytearray

    def read(self) -> bytes:
        """The content, decompressed."""
        content, encoding = bytes(self.content), self.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding in ("gzip", "x-gzip"):
            try:
                content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content, LARGEST_ANSWER + 1)
            except zlib.error:
                raise _UselessError("the answer is not compressed as it says") from None
        elif encoding not in ("identity", ""):
            raise _UselessError("the answer is compressed in a way that was not asked for")
        if len(content) > LARGEST_ANSWER:
            raise _UselessError(f"the answer is longer than {LARGEST_ANSWER:,} bytes")
        return content


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """A thread's event loop: only in one can a request be ended wherever it is, in the midst of headers too."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def without_user(url: str) -> str:
    """The address without a user's name and password in it."""
    return re.sub("//.*@", "//", url)


def _differs(alone: Answer, echoed: Answer) -> str | None:
    """Why the first place of a repeated prompt does not say what is likely at the end of the same prompt."""
    if "problem" in echoed:
        return echoed["problem"]
    found, likeliest = dict(echoed["next"][0]), sorted(alone["next"][0], key=lambda pair: -pair[1])
    sure = [pair for pair in likeliest if pair[0].strip("\ufffd")][:3]  # parts of characters are all spelled alike
    if len(sure) > 1 and all(abs(found.get(token, -math.inf) - value) < 0.5 for token, value in sure):
        return None
    return "they are not those of the same place at the end of a prompt"


def _retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError, LookupError):
        return 0.0
