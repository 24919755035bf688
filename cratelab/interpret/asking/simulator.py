"""Activations foretold by a language model that reads an explanation: the expectation of the number it would write."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cratelab.corpora.tokenizers import Tokenizer
from cratelab.interpret.asking.answers import Asker, Cost
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.prompts import as_question, simulation_prompt, token_writer
from cratelab.interpret.asking.replies import NUMBERS, ROUNDING, number_in
from cratelab.interpret.excerpts import Excerpts
from cratelab.reading import NO_TOKEN

Place = tuple[int, int, int]  # neuron, excerpt, token

NO_NUMBER = "no number among the likeliest tokens"


@dataclass
class LanguageModelSimulator(Asker):
    """Foretells activations from explanations: the expectation of the number that a language model would write.

    Over the numbers k among the likeliest next tokens, s = Σ k p(k) / Σ p(k); 0 where none is among them. The scale is
    0 to 9, since many tokenizers have two tokens for 10.

    If the endpoint is `all_at_once`, each excerpt is a request; else each token of each excerpt is.

    Attributes:
        top: how many likeliest next tokens to ask a server for; some allow no more than 5. A model on this machine is
            asked for the numbers themselves.
        ten: extend the scale to 10, and where "1" may come ask once more how likely "0" is to follow.
        problems: of all simulations so far, how many places are 0 for which reason.

    Raises:
        ValueError: `ten` with an endpoint that does not continue texts, or `top` below 1.
    """

    top: int = 20
    ten: bool = False
    problems: Counter = field(default_factory=Counter, init=False)

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

    def simulate(self, texts: Sequence[str | None], excerpts: Excerpts, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Activations on excerpts.

        Args:
            texts: explanations of the l × h neurons, layer by layer.
            excerpts: of these neurons.
            tokenizer: that made the excerpts' tokens.

        Returns:
            (l, h, k, w) float64 in 0 to 9 or 10, where 0 stands for no text or no number too, and NaN for neurons
            without an explanation; and (l, h) the share of tokens for which a number came.

        Raises:
            ValueError: there are more or fewer texts than neurons; or as the endpoint.
        """
        tokens = self._tokens(texts, excerpts)
        mass = torch.zeros(*tokens.shape, self.most + 1, dtype=torch.float64, device="cpu")  # of each number
        for place, masses in self._read(lambda: self._requests(texts, tokens, tokenizer), self.most):
            mass[place] = masses
            if not masses.any():
                self.problems[NO_NUMBER] += 1
        if self.ten:  # where 10 has no token of its own, its mass is in that of 1
            mixed = (mass[..., 1] > 0) & (mass[..., 10] == 0)
            for place, after in self._read(lambda: self._after_one(mixed, texts, tokens, tokenizer), 0):
                one, zero = float(mass[place][1]), float(after[0])
                mass[place][1], mass[place][10] = one * (1 - zero), one * zero
        total = mass.sum(-1)
        numbers = torch.arange(self.most + 1, dtype=torch.float64, device="cpu")
        simulated = mass @ numbers / total.where(total > 0, 1)
        simulated[[j for j, text in enumerate(texts) if text is None]] = torch.nan
        coverage = (total > 0).sum((1, 2)) / (tokens != NO_TOKEN).sum((1, 2)).clamp(min=1)
        shape = excerpts.tokens.shape[:2]
        return simulated.unflatten(0, shape), coverage.unflatten(0, shape)

    def estimate_cost(self, texts: Sequence[str | None], excerpts: Excerpts, tokenizer: Tokenizer) -> Cost:
        """What `simulate` would ask, without asking more than a trial of what the endpoint can do.

        With `ten`, the second questions are not counted; there is at most one for each token.
        """
        tokens = self._tokens(texts, excerpts)
        return self.estimate(request for _, request in self._requests(texts, tokens, tokenizer))

    def _tokens(self, texts: Sequence[str | None], excerpts: Excerpts) -> Tensor:
        """(m, k, w) of m = l × h neurons."""
        tokens = excerpts.tokens.flatten(0, 1)
        if len(texts) != len(tokens):
            raise ValueError(f"{len(texts)} explanations cannot be of the {len(tokens)} neurons of these excerpts")
        return tokens

    def _requests(
        self, texts: Sequence[str | None], tokens: Tensor, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], Request]]:
        """Requests, and the places that each asks about."""
        for places, pieces in self._prompts(texts, tokens, tokenizer):
            if self.endpoint.all_at_once:
                yield places, Request(tuple(pieces), top=self.top)
                continue
            for i in range(len(pieces)):
                text = "".join(pieces[: i + 1])
                text = text if self.endpoint.continues else as_question(text)
                yield places[i : i + 1], Request((text,), top=self.top)

    def _prompts(
        self, texts: Sequence[str | None], tokens: Tensor, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], list[str]]]:
        write = token_writer(tokenizer)
        for j, text in enumerate(texts):
            for r, excerpt in enumerate(tokens[j].tolist()):
                places = [(j, r, t) for t, token in enumerate(excerpt) if token != NO_TOKEN]
                if text is not None and places:
                    written = [write(token) for token in excerpt if token != NO_TOKEN]
                    yield places, simulation_prompt(text, written, self.most)

    def _after_one(
        self, mixed: Tensor, texts: Sequence[str | None], tokens: Tensor, tokenizer: Tokenizer
    ) -> Iterator[tuple[list[Place], Request]]:
        """At the places where `mixed` (m, k, w) is true: what follows a 1?"""
        for places, pieces in self._prompts(texts, tokens, tokenizer):
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
                    self.problems[str(error)] += 1


def number_masses(pairs: Iterable[tuple[str, float]], most: int) -> Tensor:
    """The probabilities (most + 1) of the numbers 0 to `most`, from tokens and their log-probabilities.

    A number counts with white space around it, as tokenizers have it.

    Raises:
        ValueError: a log-probability is NaN or positive.
    """
    masses = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    for token, log_probability in pairs:
        if not log_probability <= ROUNDING:
            raise ValueError("a log-probability that is none")
        if (number := number_in(token)) is not None and NUMBERS[number] <= most:
            masses[NUMBERS[number]] += math.exp(log_probability)
    return masses
