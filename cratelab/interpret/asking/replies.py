"""What stands in a reply of OpenAI's API: text, or the likeliest next tokens, or a problem."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

ROUNDING = 0.01  # how far above 0 a server may round a log-probability

NUMBERS = {str(n): n for n in range(11)}  # what an activation is written as

Answer = dict  # "text", or "next": for each piece of the prompt [[token, log-probability], …]; or "problem": why not


def number_in(token: str) -> str | None:
    """The number 0 to 10 that a token is, with white space around it as tokenizers have it; None if it is another."""
    number = token.strip(" \t\n▁Ġ")
    return number if number in NUMBERS else None


def only_numbers(pairs: Iterable[tuple[str, float]]) -> list[list]:
    """Of tokens and their log-probabilities those that are numbers, each number once: all that is worth keeping."""
    masses: dict[str, float] = {}
    for token, value in pairs:
        if (number := number_in(token)) is not None:
            masses[number] = masses.get(number, 0.0) + math.exp(value)
    return [[number, round(math.log(mass), 7) if mass else -math.inf] for number, mass in masses.items()]


def read_text(choice: dict) -> Answer:
    return text_or_problem(choice["message"]["content"] if "message" in choice else choice["text"])


def read_next(choice: dict) -> Answer:
    logprobs = choice["logprobs"]
    if logprobs is None:
        return {"problem": "the answer has no log-probabilities"}
    if "content" in logprobs:  # chat, and llama.cpp always
        pairs = [[entry["token"], entry["logprob"]] for entry in logprobs["content"][0]["top_logprobs"]]
    else:
        pairs = logprobs["top_logprobs"][0].items()
    return _next_or_problem([pairs])


def read_echoed(choice: dict, pieces: Sequence[str], shift: int = 0) -> Answer:
    """The likeliest tokens after each piece, in a choice that repeats the prompt.

    Places are found by counting tabs: the servers' `text_offset` counts special tokens and parts of characters, or
    is -1. The prompt ends at the last tab, before the one token that is new.

    Args:
        choice: of the reply.
        pieces: of the prompt.
        shift: 0 where a token stands beside what was likely in its place; 1 where it stands beside what was likely
            after it, and the new token is left out, as llama-cpp-python does for models without a token at the
            beginning.
    """
    logprobs = choice["logprobs"]
    if logprobs is None:
        return {"problem": "the answer has no log-probabilities"}
    tabs = accumulate(token.count("\t") for token in logprobs["tokens"])
    after = {n: i for i, (token, n) in enumerate(zip(logprobs["tokens"], tabs, strict=True), 1) if token.endswith("\t")}
    places = [after.get(n) for n in accumulate(piece.count("\t") for piece in pieces)]
    if None in places or places[-1] - shift != len(logprobs["top_logprobs"]) - 1:
        return {"problem": "the answer does not repeat the prompt with a token that ends at each place"}
    found = [logprobs["top_logprobs"][place - shift] for place in places]
    if None in found:
        return {"problem": "the answer has no log-probabilities"}
    return _next_or_problem(pairs.items() for pairs in found)


def text_or_problem(text: str | None) -> Answer:
    """An answer of this text, without the reasoning that some models put before it."""
    text = (text or "").rpartition("</think>")[2].strip()
    if text.startswith("<think>"):
        return {"problem": "the answer ends within the model's reasoning: allow more max_tokens"}
    return {"text": text} if text else {"problem": "the answer is empty"}


def _next_or_problem(places: Iterable[Iterable[tuple[str, float]]]) -> Answer:
    found = [[[str(token), float(value)] for token, value in pairs] for pairs in places]
    if not all(value <= ROUNDING for pairs in found for _, value in pairs):  # NaN is not, either
        return {"problem": "a log-probability that is none"}
    return {"next": found}
