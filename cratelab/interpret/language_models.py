"""The paper's protocol: one language model puts a neuron into words, another foretells its activations from them.

A neuron's excerpts are shown as tables of tokens and activations, 0 to 10. The simulated activation of a token is the
expectation of the number that a language model would write after it. The score of both together is that of
`cratelab.interpret.scores`.

Source: Bills et al. (2023); Bai & Ma (2024).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cratelab.arguments import check_seed
from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.asking.answers import Asker, Cost
from cratelab.interpret.asking.endpoints import ROUNDING, Request
from cratelab.interpret.asking.prompts import (
    as_question,
    drop_unprintable,
    explanation_prompt,
    simulation_prompt,
    token_writer,
)
from cratelab.interpret.explainers import discretise
from cratelab.interpret.records import Excerpts
from cratelab.reading import NO_TOKEN
from cratelab.storage import read_json, write_json

Neuron = tuple[int, int]
Place = tuple[int, int, int]  # neuron, excerpt, token

LONGEST_SENTENCE = 2000  # characters
NO_NUMBER = "no number among the likeliest tokens"


@dataclass
class TextExplanations:
    """What a language model says of m neurons.

    Attributes:
        neurons: (layer, index) of each.
        texts: a sentence for each; None where there is none.
        reasons: why there is none; None where there is one.
    """

    neurons: list[Neuron]
    texts: list[str | None]
    reasons: list[str | None]

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no explanations.
        """
        held = read_json(path)
        try:
            found = cls([(layer, index) for layer, index in held["neurons"]], held["texts"], held["reasons"])
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

    Attributes:
        max_tokens: length of an answer.
        temperature: of the sampled answer; the paper takes 1, by default the likeliest is taken.
        seed: of the sampling, where the endpoint has one.

    Raises:
        ValueError: `max_tokens`, `temperature` or `seed` is out of range.
    """

    max_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"max_tokens must be at least 1, temperature at least 0; got {self.max_tokens}, {self.temperature}"
            )

    def explain(self, excerpts: Excerpts, tokenizer: Tokenizer, neurons: Sequence[Neuron]) -> TextExplanations:
        """Put neurons into words.

        Args:
            excerpts: the explaining excerpts of all neurons.
            tokenizer: that made the excerpts' tokens.
            neurons: (layer, index) of the m neurons to explain.

        Returns:
            m explanations. There is none, and no request, for a neuron that is never active in its excerpts.

        Raises:
            ValueError: there is no such neuron; or see the endpoint.
        """
        chosen = select_neurons(excerpts, neurons)
        active = (chosen.activations > 0).flatten(2).any(2)[0].tolist()
        answers = iter(list(self.ask(lambda: self._requests(chosen, tokenizer))))
        found = [next(answers) if it else {"problem": "never active in its excerpts"} for it in active]
        texts = [first_line(answer.get("text", "")) or None for answer in found]
        reasons = [
            None if text else answer.get("problem", "the answer is empty")
            for text, answer in zip(texts, found, strict=True)
        ]
        return TextExplanations(list(neurons), texts, reasons)

    def estimate_cost(self, excerpts: Excerpts, tokenizer: Tokenizer, neurons: Sequence[Neuron]) -> Cost:
        """What `explain` would ask, without asking."""
        return self.estimate(self._requests(select_neurons(excerpts, neurons), tokenizer))

    def _requests(self, chosen: Excerpts, tokenizer: Tokenizer) -> Iterator[Request]:
        write = token_writer(tokenizer)
        levels = discretise(chosen.activations)[0].int()
        for tokens, level, active in zip(chosen.tokens[0], levels, (chosen.activations[0] > 0), strict=True):
            if active.any():
                texts = [
                    [(write(token), n) for token, n in zip(*text, strict=True) if token != NO_TOKEN]
                    for text in zip(tokens.tolist(), level.tolist(), strict=True)
                ]
                prompt = explanation_prompt([text for text in texts if text])
                yield Request((prompt,), self.max_tokens, temperature=self.temperature, seed=self.seed)


@dataclass
class LanguageModelSimulator(Asker):
    """Foretells activations from explanations: the expectation of the number that a language model would write.

    Over the numbers k among the likeliest next tokens, s = Σ k p(k) / Σ p(k); 0 where none is among them. The scale is
    0 to 9, since many tokenizers have two tokens for 10.

    If the endpoint is `all_at_once`, each excerpt is a request; else each token of each excerpt is.

    Attributes:
        top: how many likeliest next tokens to ask for; some servers allow no more than 5.
        ten: extend the scale to 10, and where "1" may come ask once more how likely "0" is to follow.
        problems: after `simulate`, for each of the m neurons how many places are 0 or undefined for which reason.

    Raises:
        ValueError: `ten` with an endpoint that does not continue texts, or `top` below 1.
    """

    top: int = 20
    ten: bool = False
    problems: list[Counter] = field(default_factory=list, init=False)

    def __post_init__(self):
        if self.top < 1 or (self.ten and not self.endpoint.continues):
            raise ValueError(
                "top must be at least 1, and ten needs an endpoint that continues texts (chat=False); "
                f"got top={self.top}, ten={self.ten}"
            )

    @property
    def most(self) -> int:
        """The highest number of the scale."""
        return 10 if self.ten else 9

    def simulate(self, explanations: TextExplanations, excerpts: Excerpts, tokenizer: Tokenizer) -> Tensor:
        """Activations on excerpts.

        Args:
            explanations: of m neurons.
            excerpts: of all neurons; only those of the m are read.
            tokenizer: that made the excerpts' tokens.

        Returns:
            (1, m, k, w) float64, in 0 to 9 or 10, 0 where there is no text; NaN for neurons without an explanation.

        Raises:
            ValueError: there is no such neuron; or see the endpoint.
        """
        chosen = select_neurons(excerpts, explanations.neurons)
        self.problems = [Counter() for _ in explanations.neurons]
        mass = torch.zeros(*chosen.tokens.shape[1:], self.most + 1, dtype=torch.float64, device="cpu")  # of each number
        for place, masses in self._read(lambda: self._requests(explanations, chosen, tokenizer), self.most):
            mass[place] = masses
            self.problems[place[0]][NO_NUMBER] += float(masses.sum()) == 0
        if self.most == 10:  # where 10 has no token of its own, its mass is in that of 1
            mixed = (mass[..., 1] > 0) & (mass[..., 10] == 0)
            for place, after in self._read(lambda: self._after_one(mixed, explanations, chosen, tokenizer), 0):
                one, zero = float(mass[place][1]), float(after[0])
                mass[place][1], mass[place][10] = one * (1 - zero), one * zero
        self.problems = [+counted for counted in self.problems]  # without what occurred 0 times
        numbers = torch.arange(self.most + 1, dtype=torch.float64, device="cpu")
        total = mass.sum(-1)
        simulated = mass @ numbers / total.where(total > 0, 1)
        for j, text in enumerate(explanations.texts):
            if text is None:
                simulated[j] = torch.nan
                self.problems[j][f"no explanation: {explanations.reasons[j]}"] = int((chosen.tokens[0, j] >= 0).sum())
        return simulated[None]

    def estimate_cost(self, explanations: TextExplanations, excerpts: Excerpts, tokenizer: Tokenizer) -> Cost:
        """What `simulate` would ask, without asking more than a trial of what the endpoint can do.

        With `ten`, the second questions are not counted; there is at most one for each token.
        """
        chosen = select_neurons(excerpts, explanations.neurons)
        return self.estimate(request for _, request in self._requests(explanations, chosen, tokenizer))

    def _requests(
        self, explanations: TextExplanations, chosen: Excerpts, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], Request]]:
        """Requests, and the places that each asks about."""
        for places, pieces in self._prompts(explanations, chosen, tokenizer):
            if self.endpoint.all_at_once:
                yield places, Request(tuple(pieces), top=self.top)
                continue
            for i in range(len(pieces)):
                text = "".join(pieces[: i + 1])
                text = text if self.endpoint.continues else as_question(text)
                yield places[i : i + 1], Request((text,), top=self.top)

    def _prompts(
        self, explanations: TextExplanations, chosen: Excerpts, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], list[str]]]:
        write = token_writer(tokenizer)
        for j, text in enumerate(explanations.texts):
            for r, tokens in enumerate(chosen.tokens[0, j].tolist()):
                places = [(j, r, t) for t, token in enumerate(tokens) if token != NO_TOKEN]
                if text is not None and places:
                    written = [write(token) for token in tokens if token != NO_TOKEN]
                    yield places, simulation_prompt(text, written, self.most)

    def _after_one(
        self, mixed: Tensor, explanations: TextExplanations, chosen: Excerpts, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], Request]]:
        """At the places where `mixed` (m, k, w) is true: what follows a 1?"""
        for places, pieces in self._prompts(explanations, chosen, tokenizer):
            for i, place in enumerate(places):
                if mixed[place]:
                    yield places[i : i + 1], Request(("".join(pieces[: i + 1]) + "1",), top=self.top)

    def _read(
        self, asked: Callable[[], Iterator[tuple[list[Place], Request]]], most: int
    ) -> Iterator[tuple[Place, Tensor]]:
        """Places and the probabilities (most + 1) of numbers there; places with a problem are counted and left out."""
        answers = self.ask(lambda: (request for _, request in asked()))
        for (places, _request), answer in zip(asked(), answers, strict=True):
            problem = answer.get("problem")
            for i, place in enumerate(places):
                try:
                    if problem or i >= len(answer.get("next", [])):
                        raise ValueError(problem or "the answer says nothing of this place")
                    yield place, number_masses(answer["next"][i], most)
                except ValueError as error:
                    self.problems[place[0]][str(error)] += 1


def number_masses(pairs: Iterable[tuple[str, float]], most: int) -> Tensor:
    """The probabilities (most + 1) of the numbers 0 to `most`, from tokens and their log-probabilities.

    A number counts with white space around it, as tokenizers have it.

    Raises:
        ValueError: a log-probability is NaN or positive.
    """
    numbers = {str(n): n for n in range(most + 1)}
    masses = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    for token, log_probability in pairs:
        if not log_probability <= ROUNDING:
            raise ValueError("a log-probability that is none")
        if (number := token.strip(" \t\n▁Ġ")) in numbers:
            masses[numbers[number]] += math.exp(log_probability)
    return masses


def first_line(text: str) -> str:
    """The first line of an answer that is not blank, without quotation marks around it and what does not print.

    It is cut where no sentence is so long: every token that is simulated is asked for with the explanation before it.
    """
    return drop_unprintable(text.strip().partition("\n")[0]).strip('"“”')[:LONGEST_SENTENCE]


def select_neurons(excerpts: Excerpts, neurons: Sequence[Neuron]) -> Excerpts:
    """Of excerpts (l, h, k, …) those of m neurons (layer, index), as one layer: (1, m, k, …).

    Raises:
        ValueError: there is no such neuron, or there are no excerpts.
    """
    n_layers, h, k = excerpts.starts.shape
    wrong = [neuron for neuron in neurons if not (0 <= neuron[0] < n_layers and 0 <= neuron[1] < h)]
    if wrong or not k or not len(neurons):
        raise ValueError(
            f"select_neurons needs excerpts, and neurons as (layer, index) below ({n_layers}, {h}); "
            f"got {k} excerpts of each and {', '.join(map(str, wrong[:5] or neurons[:5])) or 'no neuron'}"
        )
    layers, indices = map(list, zip(*neurons, strict=True))
    return Excerpts(*(getattr(excerpts, each.name)[layers, indices][None] for each in fields(Excerpts)))
