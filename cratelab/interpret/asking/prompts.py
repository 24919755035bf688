"""What the language model reads: tables of tokens and activations that no token can break.

A row is a token, a tab, and the neuron's activation there. Tabs, line ends, backslashes and everything else that does
not print are written as escapes, so a row has one tab and one line end, whatever the token; and what could pass for a
special token of the reading model, in angle brackets, is no longer spelt like one.
"""

import re
from collections.abc import Callable
from functools import cache

from cratelab.corpora.tokenizers import Tokenizer
from cratelab.reading import token_text

Row = tuple[str, int]

EXAMPLE = "words for weather, most of all where it is violent"
_ROWS: list[list[Row]] = [
    [("After", 0), (" the", 0), (" storm", 10), (" came", 1), (" a", 0), (" mild", 4), (" rain", 7), (".", 0)],
    [("She", 0), (" took", 0), (" the", 0), (" train", 0), (" because", 0), (" of", 0), (" snow", 8), (".", 0)],
]

_EXPLAIN = """\
A neuron of a language model was watched while the model read. Every line below is one piece of a text, a tab, and \
how active the neuron was there: 0 is silent, 10 the strongest that was seen. Say in one short sentence what the \
neuron responds to, so that somebody who has not seen these texts can foretell where in others it will be active.
"""

_SIMULATE = """\
Each neuron of a language model is described in a few words. Then comes a text the model read, one piece a line: the \
piece, a tab, and how active the neuron was there, from 0 (silent) to {most} (as strong as it gets). Where the \
activation was not noted the line says unknown.
"""

_REPLY = "?\n\nWhich number stands in place of the question mark? Answer with the number alone."


def escape(text: str) -> str:
    """`text` in one line without tabs, surrogates or special tokens; what prints stays, backslashes are doubled."""
    printed = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"(<[^<>]*)>", r"\1\\>", printed)


def drop_unprintable(text: str) -> str:
    """Foreign text in one line, without what does not print: a terminal's escape codes, surrogates, directions."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def token_writer(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function that gives each token's text, escaped."""
    return cache(lambda token: escape(token_text(tokenizer, token)))


def explanation_prompt(texts: list[list[Row]]) -> str:
    """Ask for one sentence about a neuron.

    Args:
        texts: for each excerpt its rows, activations 0 to 10. Where fewer than a fifth of all are above 0, those rows
            are shown once more by themselves.
    """
    example = f"{_tables(_ROWS)}In one sentence, neuron 1 responds to: {EXAMPLE}"
    return f"{_EXPLAIN}\nNeuron 1\n{example}\n\nNeuron 2\n{_tables(texts)}In one sentence, neuron 2 responds to:"


def simulation_prompt(explanation: str, tokens: list[str], most: int = 9) -> list[str]:
    """Ask for the activations of a text's tokens, given an explanation.

    Args:
        explanation: one sentence; escaped here.
        tokens: (w) texts of tokens, escaped.
        most: the highest number of the scale.

    Returns:
        (w) pieces. What follows the first i + 1 of them is the activation of token i; activations before are unknown.
    """
    known = [(token, str(min(n, most))) for token, n in _ROWS[0]]
    example = [(token, "unknown") for token, _ in known[:2]] + known[2:]
    table = "".join(f"{token}\t{n}\n" for token, n in example)
    head = f"{_SIMULATE.format(most=most)}\nNeuron 1: {EXAMPLE}\n{table}\nNeuron 2: {escape(explanation)}\n"
    return [(head if i == 0 else "unknown\n") + f"{token}\t" for i, token in enumerate(tokens)]


def as_question(prompt: str) -> str:
    """A simulation prompt for models that reply to a text and do not continue it."""
    return prompt + _REPLY


def _tables(texts: list[list[Row]]) -> str:
    tables = "".join(f"Text {i}\n{_table(rows)}" for i, rows in enumerate(texts, 1))
    rows = [row for text in texts for row in text]
    active = [row for row in rows if row[1] > 0]
    return tables + (f"Only where it is active\n{_table(active)}" if 5 * len(active) < len(rows) else "")


def _table(rows: list[Row]) -> str:
    return "".join(f"{token}\t{n}\n" for token, n in rows)
