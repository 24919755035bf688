"""Asking a language model many questions: what it will cost, a cache on disk so that none is asked twice, progress."""

import json
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from accelerate.utils import gather_object
from tqdm import tqdm

from cratelab.devices import processes
from cratelab.interpret.asking.endpoints import Endpoint, Request
from cratelab.interpret.asking.replies import Answer

GROUP = 512  # requests in memory at a time
TRUST = 20  # if so many first answers are all useless, the rest is not asked for
PATIENCE = 60.0  # seconds to wait for another process that writes


class AnswerCache:
    """Answers in an SQLite file, each written whole or not at all, whatever kills the process.

    Several processes may share the file, on a file system that can lock.

    Args:
        path: the file, made if need be; None keeps the answers in memory.

    Raises:
        OSError: the file cannot be read or written, such as on a full disk, or another process keeps it locked; so do
            all methods.
        ValueError: the file is something else, or damaged; so do all methods.
    """

    def __init__(self, path: str | Path | None = None):
        self._lock, self._path = threading.Lock(), path
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._named_errors():
            self._file = sqlite3.connect(
                ":memory:" if path is None else Path(path), timeout=PATIENCE, check_same_thread=False
            )
        try:
            with self._named_errors(), self._file:
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
                    " WITHOUT ROWID"  # which would keep every key twice
                )
                self._file.execute("SELECT key, answer FROM answers LIMIT 1")
        except BaseException:
            self._file.close()
            raise

    def get(self, key: str) -> Answer | None:
        """The answer kept under `key`."""
        with self._lock, self._named_errors():
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return row and self._read(row[0])

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        written = json.dumps(answer, separators=(",", ":"))
        with self._lock, self._named_errors(), self._file:
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, written))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _read(self, written: object) -> Answer:
        """An answer of text, or of next tokens [[[token, log-probability], …], …]."""
        try:
            answer = json.loads(written)
            if not isinstance(answer.get("text", ""), str):
                raise TypeError("a text that is none")
            for pairs in answer.get("next", []):
                for token, value in pairs:
                    token.strip(), float(value)
            return answer
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{self._path} holds an answer that is damaged: {error}. Move it away") from error

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if getattr(error, "sqlite_errorname", "SQLITE_ERROR").startswith(DAMAGE):
                raise ValueError(
                    f"{self._path} is no file of answers: {error}. Move it away, or take another"
                ) from error
            raise OSError(
                f"the answers in {self._path} cannot be read or written: {error}. What is in the file stays"
            ) from error


DAMAGE = "SQLITE_ERROR", "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_MISMATCH", "SQLITE_FORMAT", "SQLITE_CONSTRAINT"


@dataclass
class Cost:
    """What is about to be asked.

    Attributes:
        requests: that will be sent.
        cached: that need not be.
        prompt_tokens: of the requests, about.
        completion_tokens: of the answers, at most.
        prices: of a million prompt tokens and of a million completion tokens, in any currency.
    """

    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    prices: tuple[float, float] | None = None

    @property
    def money(self) -> float | None:
        """In the currency of the prices."""
        if self.prices is None:
            return None
        return (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6

    def __add__(self, other: Self) -> Self:
        """Both together, at the prices of the first."""
        return type(self)(
            self.requests + other.requests,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.prices,
        )

    def __str__(self) -> str:
        money = "" if self.prices is None else f": {self.money:,.2f} at {self.prices[0]} and {self.prices[1]} a million"
        return (
            f"{self.requests:,} requests ({self.cached:,} more are cached), "
            f"about {self.prompt_tokens:,} prompt tokens, at most {self.completion_tokens:,} completion tokens{money}"
        )


def estimate(
    endpoint: Endpoint,
    requests: Iterable[Request],
    cache: str | Path | None = None,
    prices: tuple[float, float] | None = None,
) -> Cost:
    """What requests will cost, without sending any. A cache that does not exist is not made.

    Raises:
        OSError: the cache cannot be read.
        ValueError: the cache is damaged.
    """
    cost = Cost(0, 0, 0, 0, prices)
    with AnswerCache(cache if cache and Path(cache).exists() else None) as known:
        for request in requests:
            if known.get(request.key(endpoint.name)) is not None:
                cost.cached += 1
                continue
            cost.requests += 1
            cost.prompt_tokens += endpoint.count_tokens(request.text)
            cost.completion_tokens += request.max_tokens
    return cost


def ask(
    endpoint: Endpoint,
    requests: Iterable[Request],
    cache: str | Path | None = None,
    total: int | None = None,
    share: bool = False,
) -> Iterator[Answer]:
    """Answers in the order of the requests, which are sent concurrently, and never one that the cache holds.

    An answer is in the cache as soon as it has come, so that a killed run asks on where it stopped. Answers that are
    problems are not kept.

    Args:
        endpoint: whom to ask.
        requests: taken some hundred at a time.
        cache: file of answers; None keeps none.
        total: how many requests there are, for the progress bar.
        share: whether the processes that Accelerate or torchrun have started, of which each asks an endpoint of its
            own, divide the requests among them. All must bring the same, and all get all answers.

    Raises:
        OSError: the cache cannot be written.
        ValueError: the first 20 answers are all problems, of one process if several share; or the cache is damaged.
    """
    n = useless = 0
    rank, n_processes = 0, 1
    if share:
        rank, n_processes = processes().process_index, processes().num_processes
    with (
        AnswerCache(cache) as known,
        ThreadPoolExecutor(endpoint.concurrency) as pool,
        tqdm(total=total, unit="request", disable=None if sys.stderr and rank == 0 else True) as bar,
    ):

        def send(key: str, request: Request) -> Answer:
            answer = endpoint.answer(request)
            if "problem" not in answer:
                known.put(key, answer)
            return answer

        rest = iter(requests)
        while group := list(islice(rest, GROUP)):
            keys = [request.key(endpoint.name) for request in group]
            own = dict(islice(dict(zip(keys, group, strict=True)).items(), rank, None, n_processes))
            answers = {key: answer for key in own if (answer := known.get(key)) is not None}
            futures = {pool.submit(send, key, request): key for key, request in own.items() if key not in answers}
            n_before = bar.n
            try:
                for future in as_completed(futures):
                    answers[futures[future]] = answer = future.result()
                    bar.update()
                    n, useless = n + 1, useless + ("problem" in answer)
                    if n == useless == TRUST:
                        raise ValueError(
                            f"the first {TRUST} answers of {endpoint.name} are of no use ({answer['problem']}): is it "
                            "the right kind of endpoint, and does the model give log-probabilities?"
                        )
            except BaseException:
                pool.shutdown(cancel_futures=True)  # answers on their way are still waited for and kept
                raise
            if share:
                answers = dict(gather_object(list(answers.items())))
            bar.update(n_before + len(group) - bar.n)
            yield from (answers[key] for key in keys)


@dataclass
class Asker:
    """Someone with questions for a language model, who says what they cost before asking them.

    Attributes:
        endpoint: the language model.
        cache: file of answers already given; None keeps none.
        prices: of a million prompt tokens and of a million completion tokens.
        announce: is told the cost before any of the questions is sent, and may raise to stop it.
        share: whether several processes divide the questions among them, as `ask` says.
    """

    endpoint: Endpoint
    _: KW_ONLY
    cache: str | Path | None = None
    prices: tuple[float, float] | None = None
    announce: Callable[[Cost], None] = print
    share: bool = False

    def estimate(self, requests: Iterable[Request]) -> Cost:
        """What requests will cost."""
        return estimate(self.endpoint, requests, self.cache, self.prices)

    def ask(self, requests: Callable[[], Iterable[Request]]) -> Iterator[Answer]:
        """Announce the cost, then ask. `requests` is called twice, so that they need not all be in memory."""
        cost = self.estimate(requests())
        self.announce(cost)
        return ask(self.endpoint, requests(), self.cache, cost.requests + cost.cached, self.share)
