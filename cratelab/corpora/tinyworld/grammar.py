"""A probabilistic grammar with memory, whose hidden choices are summed out exactly.

A document draws a domain, one of its two topics and a length, and shows none of them. Then it says a title, an
opening, some body sentences and a closing, each a template drawn by weight and filled in from left to right. Before
each sentence after the opening it closes with a probability that its length sets, and surely once the context could
not hold another sentence.

The templates of a domain form a tree of their common beginnings. No two branches of a node share a word (checked when
a grammar is made), so that, given the domain, the words said tell the node and the facts, and

    p(words | domain, topic, length) = product of p(branch) · p(word of its list | topic) · p(close or go on | length).

The sum of this over domains, topics and lengths is p(words); p(token | prefix) is a ratio of two such sums.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import log

import numpy as np

from cratelab.corpora.tinyworld.templates import PARTS, Domain, Item, Template, parse

N_TOPICS = 2
LENGTHS = (128, 32, 8)  # short, medium, long
_WITHIN, _GOES_ON, _CLOSES = range(3)  # what a token tells of the document's end


@dataclass
class Draft:
    """A document with its hidden side.

    Attributes:
        domain: index.
        topic: index, 0 or 1.
        words: indices into the vocabulary.
        items: for each word, index of the template's token that it fills, in `Grammar.items`.
        recalls: (position, tokens since the fact was last told) of each word that tells a fact again.
    """

    domain: int
    topic: int
    words: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    recalls: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Node:
    """A place in the tree: what can be said next."""

    words: dict[int, tuple] = field(default_factory=dict)  # word: (edge, fact it becomes or "", next node)
    recalls: list[tuple] = field(default_factory=list)  # (fact whose word is said, edge, next node)
    possible: set[int] = field(default_factory=set)  # words of all branches


@dataclass
class _Script:
    """A template with the fixed words in place and a slot for each of the others."""

    words: list[int]
    slots: list[tuple]  # (position, fact recalled, fact remembered, words, their cumulative weights by topic)
    items: range


class Language:
    """One domain, to write and to read. Words are indices into the vocabulary.

    Args:
        domain: its lists and templates.
        index: of each word in the vocabulary.
        first_item: index of its first item among those of the grammar.
    """

    def __init__(self, domain: Domain, index: dict[str, int], first_item: int):
        self._index = index
        self._lists = {name: words.split() for name, words in domain.lists.items()}
        parts = {part: [parse(line) for line in getattr(domain, part).strip().splitlines()] for part in PARTS}
        self.items = [item for part in parts.values() for template in part for item in template.items]
        self.list_of_fact = {item.remembers: item.choices for item in self.items if item.remembers}
        self._check(parts)

        self._scripts = {}
        for part, templates in parts.items():
            self._scripts[part] = []
            for template in templates:
                self._scripts[part].append(self._script(template, first_item))
                first_item += len(template.items)
        self._cumulative = {part: list(accumulate(each.weight for each in parts[part])) for part in PARTS}
        longest = {part: max(len(each.items) for each in parts[part]) for part in PARTS}
        self._room = longest["body"] + longest["closing"]  # with fewer tokens left, a document closes
        self.shortest_context = longest["title"] + longest["opening"] + self._room

        self._edges: list[tuple[int, Sequence[float]]] = []
        self._start, opening, between = _Node(), _Node(), _Node()
        self._grow(self._start, parts["title"], 0, opening)
        self._grow(opening, parts["opening"], 0, between)
        self._grow(between, parts["body"], 0, between, _GOES_ON)
        self._grow(between, parts["closing"], 0, None, _CLOSES)
        self._edge_end = np.array([end for end, _ in self._edges])
        self._edge_log_p = np.array([log_p for _, log_p in self._edges])  # (edges, topics)

    def _check(self, parts: dict[str, list[Template]]) -> None:
        for name, words in self._lists.items():
            if len(set(words)) < len(words):
                raise ValueError(f"the list {name} holds a word twice: {' '.join(words)}")
        told = [{item.remembers for item in template.items} for template in parts["opening"]]
        for part, templates in parts.items():
            for template in templates:
                facts = set.intersection(*told) if part in ("body", "closing") else set()
                for item in template.items:
                    if item.choices and item.choices not in self._lists:
                        raise ValueError(f"there is no list {item.choices}, only {', '.join(self._lists)}")
                    if item.remembers and item.choices != self.list_of_fact[item.remembers]:
                        raise ValueError(f"the fact {item.remembers} is drawn from two lists; draw it from one")
                    if item.recalls and item.recalls not in facts:
                        raise ValueError(f"the fact {item.recalls} may be recalled before it is told ({part})")
                    facts.add(item.remembers)

    def _words(self, item: Item) -> tuple[list[int], list[list[int]]]:
        """Words that an item may become and their weights by topic: all alike for facts, else falling evenly."""
        words = [item.word] if item.word else self._lists[item.choices or self.list_of_fact[item.recalls]]
        weights = [1] * len(words) if item.remembers else list(range(len(words), 0, -1))
        return [self._index[word] for word in words], [weights, weights[::-1]]

    def _script(self, template: Template, first_item: int) -> _Script:
        fixed, slots = [], []
        for position, item in enumerate(template.items):
            words, weights = self._words(item)
            fixed.append(words[0])
            if not item.word:
                slots.append((position, item.recalls, item.remembers, words, [list(accumulate(w)) for w in weights]))
        return _Script(fixed, slots, range(first_item, first_item + len(fixed)))

    def _grow(self, node: _Node, templates: list[Template], depth: int, after: _Node | None, end: int = _WITHIN):
        """Grow below `node` the templates, which agree in their first `depth` items, each leading to `after`."""
        branches: dict[tuple, list[Template]] = {}
        for template in templates:
            branches.setdefault(template.items[depth].symbol, []).append(template)
        total = sum(template.weight for template in templates)
        for branch in branches.values():
            item = branch[0].items[depth]
            said = " ".join("".join(each.symbol) for each in branch[0].items[: depth + 1])
            ended = {len(template.items) == depth + 1 for template in branch}
            if len(ended) == 2:
                raise ValueError(f"one template ends where another goes on, after: {said}")
            words, weights = self._words(item)
            if not node.possible.isdisjoint(words):
                raise ValueError(f"two templates go on with different items that share a word, one is: {said}")
            node.possible.update(words)
            log_branch = log(sum(template.weight for template in branch) / total)
            child = after if True in ended else _Node()
            if item.recalls:
                node.recalls.append((item.recalls, self._edge(end, [log_branch] * N_TOPICS), child))
            else:
                for word, weight in zip(words, zip(*weights, strict=True), strict=True):
                    log_p = [log_branch + log(w / sum(all_w)) for w, all_w in zip(weight, weights, strict=True)]
                    node.words[word] = self._edge(end, log_p), item.remembers, child
            if child is not after:
                self._grow(child, branch, depth + 1, after)

    def _edge(self, end: int, log_p: list[float]) -> int:
        self._edges.append((end, log_p))
        return len(self._edges) - 1

    def write(self, draft: Draft, closes: float, context: int, uniform: Iterator[float]) -> None:
        """Write a document, which closes before a sentence with probability `closes`, into an empty draft."""
        facts: dict[str, tuple[int, int]] = {}  # word and position

        def say(part: str) -> None:
            script = self._scripts[part][_pick(self._cumulative[part], uniform)]
            start = len(draft.words)
            draft.words += script.words
            draft.items += script.items
            for offset, recalls, remembers, words, cumulative in script.slots:
                position = start + offset
                if recalls:
                    word, told = facts[recalls]
                    draft.recalls.append((position, position - told))
                else:
                    word = words[_pick(cumulative[draft.topic], uniform)]
                draft.words[position] = word
                if recalls or remembers:
                    facts[recalls or remembers] = word, position

        say("title")
        say("opening")
        while len(draft.words) + self._room <= context and next(uniform) >= closes:
            say("body")
        say("closing")

    def read(self, words: Sequence[int]) -> list[int]:
        """The edges that the words take from the start, as far as the domain could have said them."""
        node, path, facts = self._start, [], {}
        for word in words:
            edge, fact, child = node.words.get(word) or self._recalled(node, facts, word)
            if edge is None:
                break
            path.append(edge)
            if fact:
                facts[fact] = word
            if child is None:
                break
            node = child
        return path

    @staticmethod
    def _recalled(node: _Node, facts: dict[str, int], word: int) -> tuple:
        for fact, edge, child in node.recalls:
            if facts[fact] == word:
                return edge, "", child
        return None, "", None

    def log_prob(self, words: Sequence[int], closes: np.ndarray, context: int) -> np.ndarray:
        """(k, topics · lengths) nats of the first k prefixes of the words; the domain could not say more of them."""
        path = np.array(self.read(words), dtype=int)
        never, surely = np.full(len(closes), -np.inf), np.zeros(len(closes))
        free = np.array([surely, np.log1p(-closes), np.log(closes)])  # by _WITHIN, _GOES_ON, _CLOSES
        full = np.array([surely, never, surely])
        is_full = np.arange(len(path)) + self._room > context
        end = np.array([free, full])[is_full.astype(int), self._edge_end[path]]
        log_p = np.cumsum(self._edge_log_p[path][:, :, None] + end[:, None, :], axis=0)
        return log_p.reshape(len(path), N_TOPICS * len(closes))


class Grammar:
    """Several domains, equally likely, over one vocabulary.

    Args:
        domains: by name.
        lengths: a document of a length closes before a sentence with probability length/context, at most ½.

    Attributes:
        vocabulary: every word, sorted.
        items: (domain, item) of every token of every template; a draft refers to them.

    Raises:
        ValueError: a domain contradicts itself, or its words would not tell which template is being said.
    """

    def __init__(self, domains: dict[str, Domain], lengths: Sequence[int] = LENGTHS):
        words = set()
        for domain in domains.values():
            words.update(*(text.split() for text in domain.lists.values()))
            for part in PARTS:
                words.update(
                    item.word for line in getattr(domain, part).strip().splitlines() for item in parse(line).items
                )
        self.vocabulary = sorted(words - {""})
        index = {word: i for i, word in enumerate(self.vocabulary)}
        self.domains, self.lengths = domains, lengths
        self.languages: list[Language] = []
        self.items: list[tuple[int, Item]] = []
        for i, domain in enumerate(domains.values()):
            self.languages.append(Language(domain, index, len(self.items)))
            self.items += [(i, item) for item in self.languages[i].items]

    def write(self, context: int, uniform: Iterator[float]) -> Iterator[Draft]:
        """Documents without end.

        Args:
            context: the most tokens that a document may have.
            uniform: numbers drawn uniformly from [0, 1).

        Raises:
            ValueError: some document would not fit the context.
        """
        closes = self._closes(context).tolist()
        while True:
            domain, topic, length = (int(next(uniform) * n) for n in (len(self.languages), N_TOPICS, len(self.lengths)))
            draft = Draft(domain, topic)
            self.languages[domain].write(draft, closes[length], context, uniform)
            yield draft

    def log_prob(self, words: Sequence[int], context: int) -> np.ndarray:
        """Nats of each word of a document given the words before it.

        Args:
            words: (n,) indices, from the document's first token.
            context: as it was written with.

        Returns:
            (n,), −inf from the first word on that no document could hold there.
        """
        closes = self._closes(context)
        log_p = np.full(len(words), -np.inf)
        for language in self.languages:
            given = language.log_prob(words, closes, context)
            k = len(given)
            log_p[:k] = np.logaddexp(log_p[:k], _log_mean_exp(given) - log(len(self.languages)))
        possible = np.isfinite(log_p)
        log_p[possible] = np.minimum(np.diff(log_p[possible], prepend=0.0), 0.0)  # rounding may pass 0
        return log_p

    def _closes(self, context: int) -> np.ndarray:
        needs = max(language.shortest_context for language in self.languages)
        if context < needs:
            raise ValueError(f"context must be at least {needs}, so that every document fits; got {context}")
        return np.minimum(0.5, np.array(self.lengths) / context)


def _pick(cumulative: list[int], uniform: Iterator[float]) -> int:
    return bisect_right(cumulative, next(uniform) * cumulative[-1])


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    top = np.maximum(x.max(axis=1, keepdims=True), -1e300)  # finite
    with np.errstate(divide="ignore"):
        return top[:, 0] + np.log(np.exp(x - top).mean(axis=1))
