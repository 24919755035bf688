"""The paper's protocol: one language model puts a neuron into words, another foretells its activations from them.

A neuron's excerpts are shown as tables of tokens and activations, 0 to 10. The simulated activation of a token is the
expectation of the number that a language model would write after it. Explainer and explanations are what
`cratelab.interpret.explainers` says they are, so that both together are scored as any others.

Source: Bills et al. (2023); Bai & Ma (2024).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from cratelab.arguments import check_seed, check_whole
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.asking.answers import AnswerCache, Asker, Cost
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.prompts import EXAMPLE, drop_unprintable, explanation_prompt, token_writer
from cratelab.interpret.asking.replies import Answer
from cratelab.interpret.asking.simulator import LanguageModelSimulator
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import discretise, others
from cratelab.reading import NO_TOKEN
from cratelab.storage import read_json, write_json

Neuron = tuple[int, int]

LONGEST_SENTENCE = 2000  # characters
NEVER_ACTIVE = "never active in its excerpts"
ECHO = "the answer repeats the prompt's example"


@dataclass
class TextExplanations:
    """What a language model says of l × h neurons, and the simulator that foretells activations from it.

    Attributes:
        shape: (l, h), that of the excerpts that were explained.
        texts: a sentence for each neuron, layer by layer; None where there is none.
        reasons: why there is none; None where there is one.
        tokenizer: of the excerpts.
        simulator: reads the texts.
    """

    shape: tuple[int, int]
    texts: list[str | None]
    reasons: list[str | None]
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)
    simulator: LanguageModelSimulator | None = field(default=None, repr=False, compare=False)

    def simulate(self, excerpts: Excerpts) -> tuple[Tensor, Tensor]:
        """As `LanguageModelSimulator.simulate`, on excerpts of the same neurons in the same order.

        Raises:
            ValueError: there is no simulator; or as the simulator.
        """
        if self.simulator is None or self.tokenizer is None:
            raise ValueError("explanations that shall simulate need a tokenizer and a simulator: pass both to `load`")
        return self.simulator.simulate(self.texts, excerpts, self.tokenizer)

    def describe(self, layer: int, neuron: int, tokenizer: Tokenizer) -> str:
        """The sentence, or why there is none.

        Raises:
            ValueError: there is no such neuron.
        """
        place = np.ravel_multi_index((layer, neuron), self.shape)
        return self.texts[place] or f"not explained: {self.reasons[place]}"

    def save(self, path: str | Path, neurons: Sequence[Neuron] | None = None) -> None:
        """Write the texts as JSON, whole or not at all.

        Args:
            path: of the file.
            neurons: the model's own (layer, index) of each, layer by layer, where the excerpts were of some neurons
                only.

        Raises:
            ValueError: these are more or fewer than the texts.
            OSError: the file cannot be written.
        """
        asked = np.ndindex(self.shape) if neurons is None else neurons
        neurons = [(int(layer), int(index)) for layer, index in asked]
        if len(neurons) != len(self.texts):
            raise ValueError(f"{len(self.texts)} texts cannot be of {len(neurons)} neurons")
        write_json(path, {"neurons": neurons, "texts": self.texts, "reasons": self.reasons})

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: Tokenizer | None = None,
        simulator: LanguageModelSimulator | None = None,
    ) -> Self:
        """What `save` wrote, with those that simulate from it: a row a layer where all have as many, else one row.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no explanations.
        """
        held = read_json(path)
        try:
            neurons = [(layer, index) for layer, index in held["neurons"]]
            if not all(type(index) is int for neuron in neurons for index in neuron):
                raise TypeError("neurons must be pairs of integers")
            in_layer = set(Counter(layer for layer, _ in neurons).values())
            h = in_layer.pop() if len(in_layer) == 1 else len(neurons)
            found = cls((len(neurons) // max(1, h), h), held["texts"], held["reasons"], tokenizer, simulator)
            for lines in found.texts, found.reasons:
                if not isinstance(lines, list) or len(lines) != len(neurons):
                    raise ValueError(f"{len(neurons)} neurons need as many texts and reasons")
                if not all(line is None or isinstance(line, str) for line in lines):
                    raise TypeError("texts and reasons must be strings or null")
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no explanations: {error!r}") from error


@dataclass
class LanguageModelExplainer(Asker):
    """Explains neurons by asking a language model for one sentence about each; one that follows instructions.

    Every neuron is a question, and simulating it some hundreds: choose some first, by `Excerpts.neurons` or
    `Records.neurons`.

    Attributes:
        tokenizer: that made the excerpts' tokens.
        simulator: foretells activations from the explanations.
        max_tokens: length of an answer.
        temperature: of the sampled answer; the paper takes 1, by default the likeliest is taken.
        seed: of the sampling, where the endpoint has one.

    Raises:
        ValueError: `max_tokens`, `temperature` or `seed` is out of range.
    """

    tokenizer: Tokenizer
    simulator: LanguageModelSimulator
    max_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        check_whole("max_tokens", self.max_tokens)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"the explainer needs a temperature at least 0, and finite; got {self.temperature}")

    def explain(self, excerpts: Excerpts) -> TextExplanations:
        """Put all neurons of the explaining excerpts into words.

        There is no explanation, and no request, for a neuron that is never active in its excerpts; and none where the
        answer repeats the prompt's example, as small models do.

        Raises:
            ValueError, OSError: as the endpoint and the cache.
        """
        answers = iter(list(self.ask(lambda: self._requests(excerpts))))
        found = [next(answers) if it else {"problem": NEVER_ACTIVE} for it in _active(excerpts)]
        texts, reasons = zip(*map(_sentence, found), strict=True)
        shape = tuple(excerpts.tokens.shape[:2])
        return TextExplanations(shape, list(texts), list(reasons), self.tokenizer, self.simulator)

    def estimate_cost(self, excerpts: Excerpts, validation: Excerpts | None = None) -> Cost:
        """What `explain` would ask, without asking it.

        With validation excerpts, what a score costs: two simulations are added, the neuron's own and the control's,
        from explanations that are as long as they may be where the cache does not hold them.
        """
        cost = self.estimate(self._requests(excerpts))
        if validation is not None:
            texts, control = self._expected(excerpts), validation.neurons(*others(*validation.tokens.shape[:2]))
            for held in validation, control:
                cost = cost + self.simulator.estimate_cost(texts, held, self.tokenizer)
        return cost

    def _expected(self, excerpts: Excerpts) -> list[str | None]:
        """The sentences that the cache holds, and as long ones as may come in place of the others."""
        requests, longest = self._requests(excerpts), {"text": "word " * self.max_tokens}
        with AnswerCache(self.cache if self.cache and Path(self.cache).exists() else None) as known:
            answers = (known.get(request.key(self.endpoint.name)) or longest for request in requests)
            return [_sentence(next(answers))[0] if it else None for it in _active(excerpts)]

    def _requests(self, excerpts: Excerpts) -> Iterator[Request]:
        write = token_writer(self.tokenizer)
        levels = discretise(excerpts.activations).int().flatten(0, 1)
        for tokens, level, active in zip(excerpts.tokens.flatten(0, 1), levels, _active(excerpts), strict=True):
            if active:
                texts = [
                    [(write(token), n) for token, n in zip(*text, strict=True) if token != NO_TOKEN]
                    for text in zip(tokens.tolist(), level.tolist(), strict=True)
                ]
                prompt = explanation_prompt([text for text in texts if text])
                yield Request((prompt,), self.max_tokens, temperature=self.temperature, seed=self.seed)


def _active(excerpts: Excerpts) -> list[bool]:
    """Which of the l × h neurons are positive anywhere."""
    return (excerpts.activations > 0).flatten(2).any(2).flatten().tolist()


def _sentence(answer: Answer) -> tuple[str | None, str | None]:
    """The explanation in an answer, or why there is none."""
    text = first_line(answer.get("text", ""))
    if EXAMPLE in text.casefold():
        return None, ECHO
    return (text, None) if text else (None, answer.get("problem", "the answer is empty"))


def first_line(text: str) -> str:
    """The first line of an answer that is not blank, without quotation marks around it and what does not print.

    It is cut where no sentence is so long: every token that is simulated is asked for with the explanation before it.
    """
    return drop_unprintable(text.strip().partition("\n")[0]).strip('"“”')[:LONGEST_SENTENCE]
