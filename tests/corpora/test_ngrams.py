import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from cratelab.corpora.ngrams import witten_bell


def by_counting(training, held_out, n_vocab, order):
    """The definition, word by word, with dictionaries."""
    followers = defaultdict(Counter)
    for i in range(len(training)):
        for k in range(min(order, i + 1)):
            followers[tuple(training[i - k : i])][training[i]] += 1

    def probability(context, word):
        shorter = probability(context[1:], word) if context else 1 / n_vocab
        seen = followers.get(context)
        if not seen:
            return shorter
        return (seen[word] + len(seen) * shorter) / (seen.total() + len(seen))

    places = range(order - 1, len(held_out))
    return [
        -np.mean([math.log(probability(tuple(held_out[i - k + 1 : i]), held_out[i])) for i in places])
        for k in range(1, order + 1)
    ]


def test_losses_are_those_of_tables_kept_in_dictionaries():
    draw = np.random.default_rng(0)
    training, held_out = (np.minimum(draw.geometric(0.3, n) - 1, 8) for n in (400, 90))
    np.testing.assert_allclose(witten_bell(training, held_out, 9, 4), by_counting(training, held_out, 9, 4), rtol=1e-12)


def test_every_context_gives_probabilities():
    training = np.random.default_rng(1).integers(5, size=60)
    for context in ([0, 1], [4, 4], [2, 3]):
        each = [math.exp(-witten_bell(training, np.array([*context, word]), 6, 3)[2]) for word in range(6)]
        assert sum(each) == pytest.approx(1)


def test_a_text_that_repeats_itself_is_known_by_its_bigrams():
    training = np.arange(3000) % 50
    losses = witten_bell(training, training[:500], 50, 3)
    assert losses[0] == pytest.approx(math.log(50), abs=1e-3) and max(losses[1:]) < 0.1


@pytest.mark.parametrize(
    ("training", "held_out", "order", "message"),
    [
        ([1, 2, 3], [1, 2, 9], 2, "held_out must be at least 2 tokens from 0 to 8; got 3 from 1 to 9"),
        ([1], [1, 2], 2, "training must be at least 2"),
        ([], [1, 2], 2, "training must be at least 2 tokens from 0 to 8; got 0"),
        ([1, 2], [1, 2], 0, "order must be at least 1"),
        ([0] * 40, [0] * 40, 20, "9 tokens to the power of 20 do not fit 64 bits"),
    ],
)
def test_what_is_no_text_of_that_vocabulary_is_refused(training, held_out, order, message):
    with pytest.raises(ValueError, match=message):
        witten_bell(np.array(training, int), np.array(held_out, int), 9, order)


def test_numbers_that_are_no_tokens_are_refused_and_not_rounded():
    with pytest.raises(ValueError, match=r"held_out must be .* from 0 to 8; got 2 from 0\.7 to 1\.2"):
        witten_bell(np.array([0, 1]), np.array([0.7, 1.2]), 9, 1)
    with pytest.raises(ValueError, match=r"n_vocab must be at least 1, a whole number; got 9\.5"):
        witten_bell(np.array([0, 1]), np.array([0, 1]), 9.5, 1)


def test_a_vocabulary_counted_by_numpy_is_as_large_as_another():
    """2¹⁶ to the power of 4 is 0 in 64 bits."""
    text = np.arange(9) * 8000
    with pytest.raises(ValueError, match="65536 tokens to the power of 4 do not fit"):
        witten_bell(text, text, np.int64(2**16), 4)
