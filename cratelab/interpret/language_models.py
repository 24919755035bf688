"""The paper's protocol: one language model puts a neuron into words, another foretells its activations from them.

A neuron's excerpts are shown as tables of tokens and activations, 0 to 10. The simulated activation of a token is the
expectation of the number that a language model would write after it. Explainer and explanations are what
`cratelab.interpret.explainers` says they are, so that both together are scored as any others.

Source: Bills et al. (2023); Bai & Ma (2024).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Self

from torch import Tensor

from cratelab.arguments import check_seed
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.asking.answers import Asker, Cost
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.prompts import drop_unprintable, explanation_prompt, token_writer
from cratelab.interpret.asking.simulator import LanguageModelSimulator
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import discretise
from cratelab.reading import NO_TOKEN
from cratelab.storage import read_json, write_json

Neuron = tuple[int, int]

LONGEST_SENTENCE = 2000  # characters


@dataclass
class TextExplanations:
    """What a language model says of m neurons, and the simulator that foretells activations from it.

    Attributes:
        neurons: (layer, index) of each, layer by layer as in the excerpts that were explained. Where these were of some
            neurons only, put the model's own numbers here before saving the texts or showing them beside all neurons.
        texts: a sentence for each; None where there is none.
        reasons: why there is none; None where there is one.
        tokenizer: of the excerpts.
        simulator: reads the texts.
    """

    neurons: list[Neuron]
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

    def describe(self, layer: int, neuron: int, tokenizer: Tokenizer | None = None) -> str:
        """The sentence, or why there is none."""
        said = dict(zip(self.neurons, zip(self.texts, self.reasons, strict=True), strict=True))
        text, reason = said.get((layer, neuron), (None, "nobody was asked"))
        return text or f"not explained: {reason}"

    def save(self, path: str | Path) -> None:
        """Write the texts as JSON, whole or not at all."""
        write_json(path, {"neurons": self.neurons, "texts": self.texts, "reasons": self.reasons})

    @classmethod
    def load(
        cls,
        path: str | Path,
        tokenizer: Tokenizer | None = None,
        simulator: LanguageModelSimulator | None = None,
    ) -> Self:
        """What `save` wrote, with those that simulate from it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no explanations.
        """
        held = read_json(path)
        try:
            neurons = [(layer, index) for layer, index in held["neurons"]]
            found = cls(neurons, held["texts"], held["reasons"], tokenizer, simulator)
            if not all(type(index) is int for neuron in found.neurons for index in neuron):
                raise TypeError("neurons must be pairs of integers")
            for lines in found.texts, found.reasons:
                if not isinstance(lines, list) or len(lines) != len(found.neurons):
                    raise ValueError(f"{len(found.neurons)} neurons need as many texts and reasons")
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
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"max_tokens must be at least 1, temperature at least 0; got {self.max_tokens}, {self.temperature}"
            )

    def explain(self, excerpts: Excerpts) -> TextExplanations:
        """Put all neurons of the explaining excerpts into words.

        There is no explanation, and no request, for a neuron that is never active in its excerpts.

        Raises:
            ValueError, OSError: as the endpoint and the cache.
        """
        answers = iter(list(self.ask(lambda: self._requests(excerpts))))
        found = [next(answers) if it else {"problem": "never active in its excerpts"} for it in _active(excerpts)]
        texts = [first_line(answer.get("text", "")) or None for answer in found]
        reasons = [
            None if text else answer.get("problem", "the answer is empty")
            for text, answer in zip(texts, found, strict=True)
        ]
        neurons = list(product(*map(range, excerpts.tokens.shape[:2])))
        return TextExplanations(neurons, texts, reasons, self.tokenizer, self.simulator)

    def estimate_cost(self, excerpts: Excerpts, validation: Excerpts | None = None) -> Cost:
        """What `explain` would ask, without asking it.

        With validation excerpts, what a score costs: two simulations are added, the neuron's own and the control's,
        from explanations that are as long as they may be.
        """
        cost = self.estimate(self._requests(excerpts))
        if validation is not None:
            longest = ["word " * self.max_tokens if active else None for active in _active(excerpts)]
            once = self.simulator.estimate_cost(longest, validation, self.tokenizer)
            cost = cost + once + once
        return cost

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


def first_line(text: str) -> str:
    """The first line of an answer that is not blank, without quotation marks around it and what does not print.

    It is cut where no sentence is so long: every token that is simulated is asked for with the explanation before it.
    """
    return drop_unprintable(text.strip().partition("\n")[0]).strip('"“”')[:LONGEST_SENTENCE]
