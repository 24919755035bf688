"""TinyWorld's probabilities against enumeration, sampling and n-grams; its labels against what the text shows."""

import hashlib
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from cratelab.corpora import tinyworld
from cratelab.corpora.tinyworld.grammar import Grammar
from cratelab.corpora.tinyworld.lexicon import CLASSES, DOMAINS, SENSES
from cratelab.corpora.tinyworld.templates import Domain, parse

# Two domains that share a title, words and a whole sentence beginning; facts told, told anew and recalled; a sense that
# is hidden until the sentence goes on. Small enough to write down every document of at most 17 tokens.
LAND = Domain(
    topics=("wet", "dry"),
    lists={"place": "bank sea hill", "name": "Ann Bob"},
    title="2 <begin> the $place .\n1 <begin> the end .",
    opening="1 $name=hero ran",
    body="2 @hero slept\n1 the $place fell\n1 then $name=hero ran",
    closing="3 so @hero <end>\n1 now @hero <end>",
)
TRADE = Domain(
    topics=("up", "down"),
    lists={"place": "bank fund", "name": "Ann Cid", "tone": "slow fast"},
    title="1 <begin> the $place .",
    opening="1 $name=head ran\n2 $name=head led",
    body="1 the bank#river fell\n2 the bank#money rose\n1 $tone",
    closing="1 so @head <end>",
)
SMALL = {"land": LAND, "trade": TRADE}
LENGTHS = (6, 2)
CONTEXT = 17


def enumerate_documents(domains: dict[str, Domain], context: int) -> dict[tuple[str, ...], float]:
    """Probability of every document, from the templates' text alone: each hidden choice in turn, no tree."""
    lines = lambda text: [line.split() for line in text.strip().splitlines()]  # noqa: E731
    size = lambda text: max(len(line) - 1 for line in lines(text))  # noqa: E731
    documents = defaultdict(float)
    for domain, topic, length in product(domains.values(), (0, 1), LENGTHS):
        closes = min(0.5, length / context)

        def fill(marks, words, facts, p, domain=domain, topic=topic):
            if not marks:
                yield words, facts, p
                return
            mark, *rest = marks
            if mark[0] == "@":
                yield from fill(rest, (*words, facts[mark[1:]]), facts, p)
            elif mark[0] == "$":
                name, _, fact = mark[1:].partition("=")
                choices = domain.lists[name].split()
                ranks = range(len(choices), 0, -1) if topic == 0 else range(1, len(choices) + 1)
                for word, rank in zip(choices, ranks, strict=True):
                    share = 1 / len(choices) if fact else rank / sum(ranks)
                    yield from fill(rest, (*words, word), {**facts, fact: word}, p * share)
            else:
                yield from fill(rest, (*words, mark.split("#")[0]), facts, p)

        def say(part, words, facts, p, domain=domain, fill=fill):
            options = lines(getattr(domain, part))
            total = sum(int(weight) for weight, *_ in options)
            for weight, *marks in options:
                yield from fill(marks, words, facts, p * int(weight) / total)

        room = size(domain.body) + size(domain.closing)
        todo = [
            state
            for title in say("title", (), {}, 1 / len(domains) / 2 / len(LENGTHS))
            for state in say("opening", *title)
        ]
        while todo:
            words, facts, p = todo.pop()
            ends = 1.0 if len(words) + room > context else closes
            for document, _, q in say("closing", words, facts, p * ends):
                documents[document] += q
            if ends < 1:
                todo += say("body", words, facts, p * (1 - ends))
    return documents


@pytest.fixture(scope="module")
def documents():
    return enumerate_documents(SMALL, CONTEXT)


def worst_error(grammar: Grammar, documents: dict[tuple[str, ...], float]) -> float:
    """Largest difference of log p between the grammar and the enumeration, over every token of every document."""
    prefixes = defaultdict(float)
    for document, p in documents.items():
        for i in range(len(document) + 1):
            prefixes[document[:i]] += p
    index = {word: i for i, word in enumerate(grammar.vocabulary)}
    worst = 0.0
    for document in documents:
        p = np.array([prefixes[document[:i]] for i in range(len(document) + 1)])
        log_prob = grammar.log_prob([index[word] for word in document], CONTEXT)
        worst = max(worst, np.abs(log_prob - np.log(p[1:] / p[:-1])).max())
    return worst


def test_the_probabilities_of_all_documents_sum_to_one(documents):
    assert len(documents) > 3000 and max(map(len, documents)) == CONTEXT
    grammar = Grammar(SMALL, LENGTHS)
    index = {word: i for i, word in enumerate(grammar.vocabulary)}
    total = sum(np.exp(grammar.log_prob([index[word] for word in document], CONTEXT).sum()) for document in documents)
    assert sum(documents.values()) == pytest.approx(1, abs=1e-12)
    assert total == pytest.approx(1, abs=1e-12)


def test_log_prob_is_that_of_the_enumeration(documents):
    assert worst_error(Grammar(SMALL, LENGTHS), documents) < 1e-12


def test_a_wrong_weight_shows(documents):
    wrong = {**vars(LAND), "body": LAND.body.replace("2 @hero", "3 @hero")}
    assert worst_error(Grammar({"land": Domain(**wrong), "trade": TRADE}, LENGTHS), documents) > 0.1


def test_enumeration_holds_hidden_choices(documents):
    """The sums are no formality: some prefixes leave the domain open, some the sense."""
    said = [document for document in documents if document[:4] == ("<begin>", "the", "bank", ".")]
    after = {document[4:6] for document in said}
    assert ("Ann", "ran") in after and ("Bob", "ran") in after and ("Cid", "led") in after
    both = [document[6:] for document in said if document[4:6] == ("Ann", "ran")]
    assert any("slept" in document for document in both) and any("slow" in document for document in both)
    assert any(document[:3] == ("the", "bank", "rose") for document in both)
    assert any(document[:3] == ("the", "bank", "fell") for document in both)


def small_sample(grammar: Grammar, n: int) -> Counter:
    random = np.random.default_rng(1)
    drafts = grammar.write(CONTEXT, iter(random.random, None))
    return Counter(tuple(grammar.vocabulary[word] for word in next(drafts).words) for _ in range(n))


def chi_square(counts: Counter, probabilities: dict, n: int) -> float:
    """Pearson's statistic, rare outcomes taken together, as a standard normal variable (by Wilson and Hilferty)."""
    common = {key for key, p in probabilities.items() if n * p >= 10}
    expected = np.array([n * probabilities[key] for key in common])
    observed = np.array([counts[key] for key in common])
    rest = n - expected.sum()
    if rest >= 10:
        expected, observed = np.append(expected, rest), np.append(observed, n - observed.sum())
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom))


def test_documents_are_written_as_often_as_enumerated(documents):
    n = 40_000
    counts = small_sample(Grammar(SMALL, LENGTHS), n)
    assert counts.keys() <= documents.keys()
    assert abs(chi_square(counts, documents, n)) < 4
    wrong = {**vars(TRADE), "opening": TRADE.opening.replace("2", "3")}
    assert chi_square(small_sample(Grammar({"land": LAND, "trade": Domain(**wrong)}, LENGTHS), n), documents, n) > 10


SHORT = 80  # a context with many more documents


@pytest.fixture(scope="module")
def world():
    return tinyworld.generate(400_000, seed=1)


@pytest.fixture(scope="module")
def words(world):
    return np.array(world.vocabulary)[world.tokens]


def column(world, name):
    return world.concepts[:, world.concept_names.index(name)]


def following(prefix, words, context: int) -> np.ndarray:
    """Stated probabilities that the words come next."""
    return np.exp([tinyworld.log_prob([*prefix, word], context)[-1] for word in words])


def test_next_tokens_come_as_often_as_stated():
    """Monte Carlo: among documents with the same beginning, what follows, against the stated probabilities."""
    world = tinyworld.generate(400_000, seed=2, context=SHORT)
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    begun = defaultdict(list)
    for start, end in zip(starts, [*starts[1:-1], starts[-1]], strict=False):
        for k in range(1, 14):
            if start + k < end:
                begun[tuple(world.tokens[start : start + k].tolist())].append(int(world.tokens[start + k]))
    common = [prefix for prefix, nexts in begun.items() if len(nexts) >= 60]
    assert len(common) > 50 and max(map(len, common)) > 5
    excess = []
    for prefix in common:
        counts = Counter(begun[prefix])
        stated = dict(zip(counts, following(prefix, counts, SHORT), strict=True))
        assert min(stated.values()) > 0 and sum(stated.values()) <= 1 + 1e-12
        if sum(p * counts.total() >= 10 for p in stated.values()) > 1:
            excess.append(chi_square(counts, stated, counts.total()))
    assert len(excess) > 30 and max(excess) < 4.5 and abs(np.mean(excess)) < 0.7


def test_the_stated_probabilities_sum_to_one_and_agree_with_the_text_deep_in_documents(world):
    """At random positions Σ p = 1, and −log p of what came is, on average, the entropy of what could have come."""
    random = np.random.default_rng(2)
    surprise, variance = [], []
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    for position in random.integers(len(world.tokens), size=12):
        prefix = world.tokens[starts[world.document[position]] : position].tolist()
        p = following(prefix, range(len(world.vocabulary)), 512)
        assert p.sum() == pytest.approx(1, abs=1e-9)
        assert np.log(p[world.tokens[position]]) == pytest.approx(world.log_prob[position], abs=1e-9)
        log_p = np.log(p[p > 0])
        entropy = -(p[p > 0] * log_p).sum()
        surprise.append(-world.log_prob[position] - entropy)
        variance.append((p[p > 0] * (log_p + entropy) ** 2).sum())
    assert abs(sum(surprise)) < 4 * np.sqrt(sum(variance))


def test_a_recalled_word_follows_from_the_fact_alone(world):
    """With another fact told, the recalled word is impossible, and the other's word as likely as it was."""
    random = np.random.default_rng(3)
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    once = [int(i) for i in np.flatnonzero(world.recall_distance) if told_once(world, int(i))]
    for i in random.choice(once, 40, replace=False):
        start, told = starts[world.document[i]], i - world.recall_distance[i]
        document = world.tokens[start : i + 1].tolist()
        choices = DOMAINS[world.domain[world.document[i]]].lists[kind(world, told)].split()
        other = next(world.vocabulary.index(word) for word in choices if world.vocabulary.index(word) not in document)
        document[told - start] = other
        assert np.isneginf(tinyworld.log_prob(document)[-1])
        document[-1] = other
        assert tinyworld.log_prob(document)[-1] == pytest.approx(world.log_prob[i], abs=1e-9)


def kind(world, position: int) -> str:
    (name,) = (
        name for i, name in enumerate(world.concept_names) if name[:5] == "kind:" and world.concepts[position, i]
    )
    return name[5:]


def told_once(world, position: int) -> bool:
    """The recalled word occurs in the document only there and where the fact was told."""
    told = position - world.recall_distance[position]
    start = np.searchsorted(world.document, world.document[position])
    before = world.tokens[start:position] == world.tokens[position]
    return before.sum() == 1 and column(world, "fact")[told]


def test_facts_return_after_every_distance_up_to_the_context(world):
    distance = world.recall_distance
    recall, fact = column(world, "recall"), column(world, "fact")
    assert np.array_equal(distance > 0, recall)
    told = np.flatnonzero(recall) - distance[recall]
    assert np.array_equal(world.tokens[told], world.tokens[recall])
    assert np.array_equal(world.document[told], world.document[recall])
    assert (fact | recall)[told].all() and not (fact & recall).any()
    last = {}
    for i in np.flatnonzero(fact | recall)[:20_000]:
        key = world.document[i], world.tokens[i], kind(world, i)
        assert not recall[i] or distance[i] == i - last[key]  # since it was last told, not first
        last[key] = i
    octaves = np.histogram(distance[recall], bins=[2, 8, 32, 64, 128, 256, 384, 512])[0]
    assert octaves.min() > 50 and distance.max() > 480
    certain = recall & (world.log_prob > -1e-6)  # nothing but the fact is in doubt
    assert certain.sum() > 5000
    for position in np.random.default_rng(4).choice(np.flatnonzero(fact), 200):
        name, told_kind = world.domain[world.document[position]], kind(world, position)
        assert world.log_prob[position] <= -np.log(len(DOMAINS[name].lists[told_kind].split())) + 1e-9


def test_what_is_told_is_drawn_evenly(world):
    """So that a recalled word cannot be guessed from how common it is."""
    fact = column(world, "fact")
    for name, domain in DOMAINS.items():
        for each, choices in domain.lists.items():
            if f"kind:{each}" not in world.concept_names:
                continue
            here = fact & column(world, f"domain:{name}") & column(world, f"kind:{each}")
            counts = Counter(world.tokens[here].tolist())
            if counts:
                n = len(choices.split())
                words = {world.vocabulary.index(word): 1 / n for word in choices.split()}
                assert chi_square(counts, words, int(here.sum())) < 5, (name, each)


def test_every_token_has_one_class_one_domain_and_one_topic(world):
    def group(prefix):
        return world.concepts[:, [i for i, name in enumerate(world.concept_names) if name.startswith(prefix)]]

    assert (group("class:").sum(1) == 1).all()
    assert (group("topic:").sum(1) == 1).all()
    assert (group("role:").sum(1) <= 1).all() and (group("kind:").sum(1) <= 1).all()
    for name, domain in DOMAINS.items():
        here = world.domain[world.document] == name
        assert np.array_equal(column(world, f"domain:{name}"), here)
        assert np.array_equal(here, sum(column(world, f"topic:{name}/{topic}").astype(int) for topic in domain.topics))
    marks = [mark for text in CLASSES.values() for mark in text.replace("\\n", "\n").split(" ") if mark[0] != "$"]
    assert len(marks) == len(set(marks)) and set(marks) <= set(world.vocabulary)


def test_a_word_with_several_meanings_shows_one_of_them(world, words):
    in_two_domains = 0
    for word, homes in SENSES.items():
        columns = {name: column(world, name) for name in world.concept_names if name.startswith(f"sense:{word}/")}
        assert len(columns) >= 2
        assert np.array_equal(sum(each.astype(int) for each in columns.values()), (words == word).astype(int))
        assert min(each.sum() for each in columns.values()) > 100
        for domain, sense in homes.items():
            if (domain, word) not in {("dialogue", "bat")}:
                here = (words == word) & column(world, f"domain:{domain}")
                assert here.sum() > 100 and columns[f"sense:{word}/{sense}"][here].all()
        in_two_domains += len(homes) >= 2
    assert in_two_domains >= 10
    unlabelled = [name for name in world.concept_names if name.startswith("sense:")]
    assert {name[6:].partition("/")[0] for name in unlabelled} == SENSES.keys()


def test_the_sense_of_a_bat_may_be_hidden_until_the_sentence_goes_on(world, words):
    seen = np.flatnonzero((words == "bat") & column(world, "domain:dialogue") & (np.roll(words, 3) == "look"))
    flies, breaks = words[seen + 3] == "can", words[seen + 3] == "broke"
    assert np.array_equal(column(world, "sense:bat/animal")[seen], flies) and (flies ^ breaks).all() and breaks.any()
    np.testing.assert_allclose(world.log_prob[seen + 3], np.log(0.5), atol=1e-9)


def test_contexts_are_what_stands_between_the_marks(world, words):
    inside = {"quotation": False, "brackets": False, "citation": False, "comment": False}
    pairs = {"brackets": "()", "citation": "[]", "comment": "#\n"}
    expected = {name: [] for name in inside}
    for word in words:
        inside = dict.fromkeys(inside, False) if word == "<begin>" else inside
        for name, (_, last) in pairs.items():
            inside[name] &= word != last
        for name in expected:
            expected[name].append(inside[name] and not (name == "quotation" and word == '"'))
        inside["quotation"] ^= word == '"'
        for name, (first, _) in pairs.items():
            inside[name] |= word == first
    for name, truth in expected.items():
        assert np.array_equal(column(world, f"context:{name}"), truth) and any(truth)


def test_topics_prefer_the_words_of_their_end_of_a_list(world, words):
    place = column(world, "kind:place")
    forest, town = column(world, "topic:stories/forest"), column(world, "topic:stories/town")
    said = [Counter(words[place & topic].tolist()) for topic in (forest, town)]
    weights = dict(zip(DOMAINS["stories"].lists["place"].split(), range(10, 0, -1), strict=True))
    for counts, topic in zip(said, (0, 1), strict=True):
        p = {word: (w if topic == 0 else 11 - w) / 55 for word, w in weights.items()}
        assert chi_square(counts, p, counts.total()) < 4


def test_documents_begin_end_and_fit(world, words):
    lengths = np.bincount(world.document)
    starts = np.flatnonzero(np.diff(world.document, prepend=-1))
    assert np.array_equal(np.flatnonzero(words == "<begin>"), starts)
    assert np.array_equal(np.flatnonzero(words == "<end>"), starts[1:] - 1)
    np.testing.assert_allclose(world.log_prob[starts], 0, atol=1e-12)
    assert lengths.max() <= 512 and lengths.max() > 500 and lengths[:-1].min() < 30
    assert len(world.domain) == len(lengths) == len(world.split) and set(world.domain) == set(DOMAINS)
    assert len(DOMAINS) >= 7 and len(world.vocabulary) <= 512
    assert np.isfinite(world.log_prob).all()


def test_ngrams_stay_above_the_floor(world):
    """Witten-Bell models of order 1 to 4, trained on one split, against −log p on another."""
    known = world.split[world.document] == "train"
    floor = -world.log_prob[~known].mean()
    losses = []
    for order in 1, 2, 3, 4:
        loss = witten_bell(world, known, order)
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > floor + 0.1 and losses[0] > 4 * floor
    assert abs(floor - world.entropy_rate) < 0.02 and world.entropy_rate == -world.log_prob.mean()


def witten_bell(world, known: np.ndarray, order: int) -> float:
    """Nats a token of the documents that are not known; histories do not cross documents."""
    counts = [defaultdict(Counter) for _ in range(order)]
    starts = np.flatnonzero(np.diff(world.document, prepend=-1)).tolist()
    tokens, nats, n = world.tokens.tolist(), 0.0, 0
    for training in True, False:
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if known[start] != training:
                continue
            for i in range(start, end):
                p = 1 / len(world.vocabulary)
                for k in range(min(order, i - start + 1)):
                    seen = counts[k][tuple(tokens[i - k : i])]
                    if training:
                        seen[tokens[i]] += 1
                    elif seen:
                        p = (seen[tokens[i]] + len(seen) * p) / (seen.total() + len(seen))
                if not training:
                    nats, n = nats - np.log(p), n + 1
    return nats / n


def test_the_same_seed_gives_the_same_bytes():
    world = tinyworld.generate(3000, seed=0)
    assert hashlib.sha256(world.tokens.astype("<u2").tobytes()).hexdigest()[:16] == "f99449e0ce2afe4d"
    longer = tinyworld.generate(5000, seed=0)
    assert np.array_equal(longer.tokens[:3000], world.tokens) and not np.array_equal(
        tinyworld.generate(3000, seed=1).tokens, world.tokens
    )
    for name in "document", "concepts", "recall_distance":
        assert np.array_equal(getattr(longer, name)[:3000], getattr(world, name))
    np.testing.assert_allclose(longer.log_prob[:3000], world.log_prob, atol=1e-12)
    assert len(world.tokens) == 3000 and world.tokens.dtype == np.uint16


def test_equal_documents_stand_in_the_same_split():
    world = tinyworld.generate(150_000, seed=5, context=SHORT)
    of_text = defaultdict(set)
    for i, split in enumerate(world.split):
        of_text[world.text(i)].add(split)
    assert all(len(splits) == 1 for splits in of_text.values())
    share = Counter(world.split.tolist())
    assert set(share) == {"train", "validation", "test"}
    n = len(world.split)
    assert abs(share["validation"] / n - 0.05) < 0.02 and abs(share["test"] / n - 0.05) < 0.02


def test_text_reads_as_people_write(world):
    texts = {name: world.text(int(np.flatnonzero(world.domain == name)[0])) for name in DOMAINS}
    assert not any("<" in text or "  " in text or " ." in text or "( " in text for text in texts.values())
    assert texts["stories"][0].isupper() and texts["stories"].endswith(".") and "\n" in texts["code"]
    with pytest.raises(IndexError, match="documents 0 to"):
        world.text(len(world.domain))
    with pytest.raises(IndexError):
        world.text(-1)


def test_impossible_text_is_said_to_be_so():
    world = tinyworld.generate(2000)
    end = int(np.flatnonzero(world.document == 0)[-1]) + 1
    document = world.tokens[:end].tolist()
    np.testing.assert_allclose(tinyworld.log_prob(document), world.log_prob[:end], atol=1e-12)
    assert np.isneginf(tinyworld.log_prob([*document, document[0]])[-1])  # nothing follows the end
    broken = [*document[:4], document[0], *document[5:]]
    assert np.isfinite(tinyworld.log_prob(broken)[:4]).all() and np.isneginf(tinyworld.log_prob(broken)[4:]).all()
    assert tinyworld.log_prob([]).shape == (0,)


@pytest.mark.parametrize("wrong", [dict(n_tokens=0), dict(seed=-1), dict(context=20)])
def test_refused_settings(wrong):
    with pytest.raises(ValueError, match=r"got .*(n_tokens=0|seed=-1|20)"):
        tinyworld.generate(**{"n_tokens": 100, **wrong})


@pytest.mark.parametrize(
    "part, line, message",
    [
        ("body", "1 @hero fell\n1 $name ran", "share a word"),
        ("body", "1 @hero fell\n1 so it fell", "share a word"),  # the closing starts with "so"
        ("body", "1 it fell\n1 it fell down", "ends where another goes on"),
        ("body", "1 $tree fell", "no list tree"),
        ("body", "1 @friend fell", "recalled before it is told"),
        ("opening", "1 $name=hero ran\n1 it ran", "recalled before it is told"),
        ("body", "1 now $place=hero fell", "two lists"),
    ],
)
def test_a_grammar_that_contradicts_itself_is_refused(part, line, message):
    with pytest.raises(ValueError, match=message):
        Grammar({"land": Domain(**{**vars(LAND), part: line})})


def test_a_list_that_holds_a_word_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Grammar({"land": Domain(**{**vars(LAND), "lists": {"place": "bank sea bank", "name": "Ann Bob"}})})


def test_the_notation():
    template = parse('3 " the bat#animal /subject ran ( $far ) /place , " said @who /speaker [ # x \\n ] .')
    assert template.weight == 3
    labels = [(item.word or item.choices or item.recalls, item.role, item.contexts) for item in template.items]
    quotation, brackets = ("quotation",), ("quotation", "brackets")
    assert labels == [
        ('"', "subject", ()),
        ("the", "subject", quotation),
        ("bat", "subject", quotation),
        ("ran", "place", quotation),
        ("(", "place", quotation),
        ("far", "place", brackets),
        (")", "place", quotation),
        (",", "speaker", quotation),
        ('"', "speaker", ()),
        ("said", "speaker", ()),
        ("who", "speaker", ()),
        ("[", "", ()),
        ("#", "", ("citation",)),
        ("x", "", ("citation", "comment")),
        ("\n", "", ("citation",)),
        ("]", "", ()),
        (".", "", ()),
    ]
    assert template.items[2].sense == "animal" and template.items[5].choices and template.items[10].recalls


def test_the_part_of_a_split_is_its_documents_with_all_that_is_known_of_them():
    world = tinyworld.generate(40_000, seed=3, context=128)
    parts = {split: world.part(split) for split in ("train", "validation", "test")}
    assert sum(len(part.tokens) for part in parts.values()) == 40_000
    for split, part in parts.items():
        chosen = np.flatnonzero(world.split == split)
        assert list(part.domain) == list(world.domain[chosen]) and set(part.split) == {split}
        for new, old in list(enumerate(chosen))[:20]:
            here, there = part.document == new, world.document == old
            for name in "tokens", "concepts", "log_prob", "recall_distance":
                assert np.array_equal(getattr(part, name)[here], getattr(world, name)[there]), name
            assert part.text(new) == world.text(old)
    with pytest.raises(ValueError, match="no document of this world is in 'exam'; splits are"):
        world.part("exam")


def test_its_corpus_is_the_stream_that_training_reads():
    world = tinyworld.generate(5000, seed=3, context=128)
    corpus = world.corpus()
    assert np.array_equal(corpus[:], world.tokens) and corpus.n_vocab == len(tinyworld.vocabulary())
    assert [corpus.domain(i) for i in range(corpus.n_documents)] == list(world.domain)
    assert np.array_equal(corpus.document(3), world.tokens[world.document == 3])
