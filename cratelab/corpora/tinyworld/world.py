"""The corpus that TinyWorld's grammar generates: tokens, labels, and the exact log p of each token."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from cratelab.corpora.documents import SPLITS, split_of
from cratelab.corpora.tinyworld.grammar import N_TOPICS, Grammar
from cratelab.corpora.tinyworld.lexicon import CLASSES, DOMAINS, SENSES
from cratelab.corpora.tinyworld.templates import Item
from cratelab.corpora.token_store import TokenizedCorpus


@dataclass(eq=False)
class World:
    """A corpus of n tokens and c concepts.

    Attributes:
        tokens: (n,) uint16, indices into the vocabulary; the last document may be cut.
        vocabulary: the words.
        document: (n,) int32, index of each token's document.
        domain: (n_documents,) names.
        split: (n_documents,) "train", "validation" or "test": 90, 5 and 5 %, by a hash of the text, so that equal
            documents are never parted.
        concepts: (n, c) bool, true where a token has the concept.
        concept_names: c names:

            | name | true of |
            |---|---|
            | `class:noun` … | the word class; each token has one |
            | `role:subject` … | tokens of a phrase with this part in its clause |
            | `context:quotation` … | tokens inside the marks; brackets, citation and (code) comment likewise |
            | `domain:law` … | tokens of its documents; a model has to infer it |
            | `topic:law/crime` … | likewise; the topic shows only in how often words occur |
            | `kind:animal` … | words that stand for any of a list |
            | `sense:bank/finance` … | the word in this sense |
            | `fact`, `recall` | a token that tells a fact for later, or tells it again |

        log_prob: (n,) nats, log p(token | visible prefix of its document), all hidden choices summed out (eq-06-2).
        recall_distance: (n,) int32, tokens since the recalled fact was last told, 0 where none is recalled.
    """

    tokens: np.ndarray
    vocabulary: list[str]
    document: np.ndarray
    domain: np.ndarray
    split: np.ndarray
    concepts: np.ndarray
    concept_names: list[str]
    log_prob: np.ndarray
    recall_distance: np.ndarray

    @property
    def entropy_rate(self) -> float:
        """Nats a token, the mean of `log_prob` without its sign; no model can expect less loss (eq-06-3)."""
        return float(-self.log_prob.mean())

    def part(self, split: str) -> "World":
        """The documents of one split as a world of their own.

        Raises:
            ValueError: `split` is not "train", "validation" or "test", or holds no document.
        """
        chosen = self.split == split
        if not chosen.any():
            raise ValueError(
                f"no document of this world is in {split!r}; splits are {', '.join(SPLITS)}: generate more"
            )
        kept = chosen[self.document]
        per_token = ("tokens", "concepts", "log_prob", "recall_distance")
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in per_token},
            document=(np.cumsum(chosen) - 1).astype(np.int32)[self.document[kept]],
            domain=self.domain[chosen],
            split=self.split[chosen],
        )

    def corpus(self) -> TokenizedCorpus:
        """The tokens in the form that training reads."""
        return TokenizedCorpus.from_arrays(self.tokens, self.document, self.domain, len(self.vocabulary))

    def text(self, document: int) -> str:
        """One document as a person would write it.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= document < len(self.domain):
            raise IndexError(f"there are documents 0 to {len(self.domain) - 1}; got {document}")
        return _text([self.vocabulary[token] for token in self.tokens[self.document == document]])


def generate(n_tokens: int = 1_000_000, seed: int = 0, context: int = 512) -> World:
    """Write a world. The same seed gives the same tokens on every machine, and a longer world starts like a shorter.

    Args:
        n_tokens: n, 1 to 2³¹ - 1.
        seed: of the random numbers, at least 0.
        context: the most tokens that a document has, 2²⁰ at most; lengths spread from a few sentences to all of it.

    Raises:
        ValueError: `n_tokens` or `seed` is out of range, or some document would not fit the context.
    """
    if not 1 <= n_tokens < 2**31 or not seed >= 0 or not context <= 2**20:
        raise ValueError(
            "TinyWorld needs n_tokens of 1 to 2**31 - 1, seed >= 0 and context <= 2**20; got "
            f"n_tokens={n_tokens}, seed={seed}, context={context}"
        )
    grammar = _grammar()
    tokens, items, domains, topics, lengths, log_probs, splits = [], [], [], [], [], [], []
    distance = np.zeros(n_tokens, dtype=np.int32)
    for draft in grammar.write(context, _uniform(seed)):
        start = len(tokens)
        words = draft.words[: n_tokens - start]
        tokens += words
        items += draft.items[: len(words)]
        lengths.append(len(words))
        domains.append(draft.domain)
        topics.append(draft.topic)
        log_probs.append(grammar.log_prob(words, context))
        splits.append(split_of(_text([grammar.vocabulary[word] for word in words])))
        for position, since in draft.recalls:
            if position < len(words):
                distance[start + position] = since
        if len(tokens) == n_tokens:
            break
    tokens = np.array(tokens, dtype=np.uint16)
    domain = np.array(domains)
    document = np.repeat(np.arange(len(domain), dtype=np.int32), lengths)
    names, concepts = _concepts(grammar, tokens, np.array(items), domain[document], np.array(topics)[document])
    return World(
        tokens=tokens,
        vocabulary=list(grammar.vocabulary),
        document=document,
        domain=np.array(list(grammar.domains))[domain],
        split=np.array(splits),
        concepts=concepts,
        concept_names=names,
        log_prob=np.concatenate(log_probs),
        recall_distance=distance,
    )


def log_prob(tokens: Sequence[int], context: int = 512) -> np.ndarray:
    """Nats of each token of one document, such as a model wrote, given those before it.

    Args:
        tokens: (n,) indices into the vocabulary, from the document's first.
        context: as in `generate`.

    Returns:
        (n,), −inf from the first token on that TinyWorld could not have written there.

    Raises:
        ValueError: some document would not fit the context.
    """
    return _grammar().log_prob(np.asarray(tokens).tolist(), context)


def vocabulary() -> list[str]:
    """The words of every world."""
    return list(_grammar().vocabulary)


@cache
def _grammar() -> Grammar:
    return Grammar(DOMAINS)


def _uniform(seed: int) -> Iterator[float]:
    """Numbers in [0, 1), from the raw stream of PCG64, which numpy promises not to change."""
    bits = np.random.PCG64(seed)
    while True:
        yield from ((bits.random_raw(4096) >> np.uint64(11)) * 2.0**-53).tolist()


def _text(words: list[str]) -> str:
    text = " ".join(word for word in words if word not in ("<begin>", "<end>"))
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r" ([.,:?)\]])|([(\[]) ", r"\1\2", text)
    text = re.sub(r" ?\n ?", "\n", text)
    if "\n" in text:  # code
        return text
    return re.sub(r'(^|[.?] |[.]" |: (?="))("?[a-z])', lambda match: match[1] + match[2].upper(), text)


def _concepts(
    grammar: Grammar, tokens: np.ndarray, items: np.ndarray, domain: np.ndarray, topic: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Names and (n, c) truth of all concepts: of the template's token, of the word in the domain, and of the topic."""
    class_of = _classes()
    of_item = [_item_concepts(grammar.languages[i].list_of_fact, item) for i, item in grammar.items]
    of_word = [
        [f"domain:{name}", f"class:{class_of[word]}"]
        + [f"sense:{word}/{sense}" for home, sense in SENSES.get(word, {}).items() if home == name]
        for name in grammar.domains
        for word in grammar.vocabulary
    ]
    of_topic = [
        [f"topic:{name}/{each}"] for name, each_domain in grammar.domains.items() for each in each_domain.topics
    ]
    names = sorted({name for labels in of_item + of_word + of_topic for name in labels})
    item_table, word_table, topic_table = (_table(labels, names) for labels in (of_item, of_word, of_topic))
    concepts = item_table[items]
    concepts |= word_table[domain * len(grammar.vocabulary) + tokens]
    concepts |= topic_table[domain * N_TOPICS + topic]
    senses = np.array([name.startswith("sense:") for name in names])
    named = (item_table & senses).any(1)[items]  # the template says which sense
    concepts[named] &= item_table[items[named]] | ~senses
    return names, concepts


def _item_concepts(list_of_fact: dict[str, str], item: Item) -> list[str]:
    labels = [f"context:{context}" for context in item.contexts]
    labels += [f"role:{item.role}"] * bool(item.role)
    labels += [f"sense:{item.word}/{item.sense}"] * bool(item.sense)
    labels += ["fact"] * bool(item.remembers) + ["recall"] * bool(item.recalls)
    labels += [] if item.word else [f"kind:{item.choices or list_of_fact[item.recalls]}"]
    return labels


def _classes() -> dict[str, str]:
    lists = {f"${name}": words.split() for domain in DOMAINS.values() for name, words in domain.lists.items()}
    words = {name: text.replace("\\n", "\n").split(" ") for name, text in CLASSES.items()}
    return {word: name for name, marks in words.items() for mark in marks for word in lists.get(mark, [mark])}


def _table(labels: list[list[str]], names: list[str]) -> np.ndarray:
    column = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(labels), len(names)), dtype=bool)
    for row, given in zip(table, labels, strict=True):
        row[[column[name] for name in given]] = True
    return table
