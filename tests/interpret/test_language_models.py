import json
import math
import re

import numpy as np
import pytest
import torch
from language_model_server import TEXT, WORDS, Words, excerpts_of, prompt_of, quiet, understanding, written

from cratelab.corpora.tokenizers import WordEncoding
from cratelab.interpret.asking.prompts import EXAMPLE
from cratelab.interpret.asking.simulator import LanguageModelSimulator
from cratelab.interpret.evaluation import evaluate
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import TokenExplainer
from cratelab.interpret.language_models import LanguageModelExplainer, TextExplanations
from cratelab.interpret.records import Records
from cratelab.interpret.scores import split
from cratelab.reading import NO_TOKEN
from cratelab.viewers.neurons import viewer

pytestmark = pytest.mark.usefixtures("on_the_cpu")

STRONG = excerpts_of(
    [[[0, 1, 2], [2, 0, NO_TOKEN]], [[0, 0, 1], [1, 1, 1]], [[0] * 3, [0] * 3]],
    [[[0.0, 2.0, 0.19], [1.99, -3.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]], [[0.0, -1.0, 0.0], [0.0] * 3]],
)


def explainer(endpoint, tokenizer=None, announce=quiet):
    simulator = LanguageModelSimulator(endpoint, announce=announce)
    return LanguageModelExplainer(endpoint, tokenizer or Words(), simulator, announce=announce)


def test_an_explainer_shows_tenths_of_the_maximum_and_takes_the_first_line(serve, connect):
    answers = {" sat\t9": '\n "animals,  mostly" \nBut also', "sun\t0\nsun": "<think>hm</think>the end"}

    def reply(path, body, n):
        mine = prompt_of(body).partition("Neuron 2\n")[2]
        return 200, {}, written(next(answer for row, answer in answers.items() if row in mine))

    server, costs = serve(reply), []
    found = explainer(connect(server, concurrency=1), announce=costs.append).explain(STRONG.neurons(0, [0, 2, 1]))
    assert found.texts == ["animals, mostly", None, "the end"] and found.shape == (1, 3)
    assert found.reasons == [None, "never active in its excerpts", None]
    assert [found.describe(0, i, Words()) for i in (0, 1)] == ["animals, mostly", f"not explained: {found.reasons[1]}"]
    for nowhere in (0, 3), (1, 0), (0, -1):
        with pytest.raises(ValueError):
            found.describe(*nowhere, Words())
    assert len(server.requests) == costs[0].requests == 2 and costs[0].completion_tokens == 2 * 60
    first, second = (prompt_of(body).partition("Neuron 2\n")[2] for _, body, _ in server.requests)
    table = "Text 1\nsun\t0\n cat\t10\n sat\t0\nText 2\n sat\t9\nsun\t0\n"
    assert first == table + "In one sentence, neuron 2 responds to:"
    assert second.endswith("Only where it is active\n cat\t10\nIn one sentence, neuron 2 responds to:")  # 1 of 6
    assert server.requests[0][1]["max_tokens"] == 60 and server.requests[0][1]["temperature"] == 0


@pytest.mark.parametrize(
    ("content", "text", "reason"),
    [
        (written(""), None, "the answer is empty"),
        (written(None), None, "the answer is empty"),
        (written('""'), None, "the answer is empty"),
        (written("<think>let me see"), None, "the answer ends within the model's reasoning: allow more max_tokens"),
        (written(5), None, "the answer has another shape"),
        (written(f'"{EXAMPLE.capitalize()}."\nand more'), None, "the answer repeats the prompt's example"),
        (written("words for weather"), "words for weather", None),
        ({"choices": [{}]}, None, "the answer has another shape"),
        (b"{", None, "the answer is not JSON"),
        (written("\x1b[2J cats\u202e\ud800 and\tdogs\x07"), "[2J cats and dogs", None),
        pytest.param(written("so " * 10**6), ("so " * 1000)[:2000], None, id="a novel"),
    ],
)
def test_an_explanation_is_a_line_that_prints_or_a_reason_why_there_is_none(serve, connect, content, text, reason):
    found = explainer(connect(serve(lambda *request: (200, {}, content)))).explain(STRONG.neurons(0, 0))
    assert found.texts == [text] and found.reasons == [reason]


def test_explanations_come_back_from_disk_and_simulate(serve, connect, tmp_path):
    found = TextExplanations((1, 2), ["cats \ud800", None], [None, "never active"])
    found.save(tmp_path / "texts.json")
    assert TextExplanations.load(tmp_path / "texts.json") == found
    with pytest.raises(ValueError, match="need a tokenizer and a simulator"):
        found.simulate(TEXT)
    simulator = LanguageModelSimulator(connect(serve(understanding)), announce=quiet)
    simulated, coverage = TextExplanations.load(tmp_path / "texts.json", Words(), simulator).simulate(TEXT)
    assert simulated.shape == TEXT.tokens.shape and coverage.tolist() == [[1, 0]]
    (tmp_path / "texts.json").write_text('{"neurons": [3]}')
    with pytest.raises(ValueError, match="holds no explanations"):
        TextExplanations.load(tmp_path / "texts.json")


@pytest.mark.parametrize(
    ("neurons", "shape"),
    [
        (None, (2, 2)),
        ([(3, 7), (3, 9), (5, 1), (5, 2)], (2, 2)),
        (np.array([[3, 7], [3, 9], [3, 10], [3, 11]]), (1, 4)),
        ([(3, 7), (5, 1), (5, 2), (5, 3)], (1, 4)),
    ],
)
def test_on_disk_the_neurons_have_the_models_own_numbers(tmp_path, neurons, shape):
    found = TextExplanations((2, 2), list("abcd"), [None] * 4)
    found.save(tmp_path / "texts.json", neurons)
    written = json.loads((tmp_path / "texts.json").read_text())
    own = [[0, 0], [0, 1], [1, 0], [1, 1]] if neurons is None else np.array(neurons).tolist()
    assert written == {"neurons": own, "texts": list("abcd"), "reasons": [None] * 4}
    back = TextExplanations.load(tmp_path / "texts.json")
    assert back.shape == shape and back.describe(shape[0] - 1, shape[1] - 1, Words()) == "d"
    with pytest.raises(ValueError, match="4 texts cannot be of 1 neurons"):
        found.save(tmp_path / "texts.json", [(0, 0)])
    assert json.loads((tmp_path / "texts.json").read_text()) == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens must be at least 1, a whole number"),
        ({"temperature": math.nan}, "temperature at least 0"),
        ({"temperature": -1.0}, "temperature at least 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**32}, "seed must be from 0 to"),
    ],
)
def test_wrong_arguments_of_an_explainer_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelExplainer(None, None, None, **options)


def test_a_token_that_only_pads_the_vocabulary_is_named(serve, connect):
    server = serve(understanding)
    padded, asking = excerpts_of([[[0, 1, len(WORDS)]]], [[[0.0, 1.0, 0.0]]]), explainer(connect(server))
    for ask_it in (lambda: asking.explain(padded), lambda: asking.simulator.simulate(["one"], padded, Words())):
        with pytest.raises(ValueError, match=f"there is no token {len(WORDS)} in the tokenizer"):
            ask_it()
    assert server.requests == []


# all the way to a score

N_WORDS, NAMES = 24, WordEncoding([f"w{i}" for i in range(24)])


@pytest.fixture
def records(on_the_cpu):
    """Of two layers of 5 neurons: the j-th of all ten is active on word j alone."""
    draw, numbers = torch.Generator("cpu").manual_seed(0), torch.zeros(2, 5, dtype=torch.float64)

    def excerpts(k: int, first: int) -> Excerpts:
        tokens = torch.randint(N_WORDS, (2, 5, k, 64), generator=draw, dtype=torch.int32)
        starts = (64 * (first + torch.arange(k))).expand(2, 5, k)
        return Excerpts(tokens, 3.0 * (tokens == torch.arange(10).reshape(2, 5, 1, 1)), starts, 0 * starts)

    return Records(excerpts(10, 0), excerpts(5, 10), excerpts(0, 0), *[numbers] * 3, numbers + 3, 5000)


class Oracle:
    """Says the word on which a neuron is strongest, and foretells 9 there and 0 elsewhere."""

    name, concurrency, all_at_once, continues = "oracle", 1, True, True

    def answer(self, request):
        if not request.top:
            return self.say(re.search(r"(w\d+)\t10\n", request.text.partition("Neuron 2\n")[2])[1])
        word = re.search(r"Neuron 2: (w\d+)", request.text)[1]
        return {"next": [[[self.number(9 * piece.endswith(f"\n{word}\t")), 0.0]] for piece in request.prompt]}

    def say(self, word):
        return {"text": word}

    def number(self, n):
        return str(n)

    def count_tokens(self, text):
        return len(text) // 4


class Silent(Oracle):
    """Explains only every other neuron."""

    def say(self, word):
        return {"text": word if int(word[1:]) % 2 else ""}


class Garbled(Oracle):
    """Every third number is none."""

    asked = 0

    def number(self, n):
        self.asked += 1
        return str(n) if self.asked % 3 else "banana"


class Mad(Oracle):
    def number(self, n):
        return "banana"


@pytest.mark.parametrize("protocol", ["top-and-random", "random-only"])
def test_who_answers_perfectly_scores_one_and_the_control_nothing(records, protocol):
    costs = []
    asking = explainer(Oracle(), NAMES, costs.append)
    said, table = evaluate({protocol: records}, {"language-model": asking, "token": TokenExplainer()})
    row = said.row()
    assert row["mean"] == pytest.approx(100) == table.row()["mean"] and row["coverage"] == 1
    assert abs(row["control"]) < 10 and row["undefined"] == 0 and len(row["layers"]) == 2
    assert said.explanations.describe(1, 2, NAMES) == "w7"
    page = viewer(records, NAMES, [(1, 2)], {"words": said.explanations}, {"words": said.scores}).html
    assert "<bdi>w7</bdi>" in page and "score 1.00" in page
    expected = asking.estimate_cost(*split(records, protocol))
    assert (
        sum(cost.requests for cost in costs)
        == expected.requests
        == 10 + 2 * 10 * (10 - 5 * (protocol != "top-and-random"))
    )


@pytest.mark.parametrize(
    ("endpoint", "mean", "coverage", "undefined"),
    [
        (Silent, (45, 55), (0.4, 0.6), 0.5),
        (Garbled, (60, 95), (0.6, 0.7), 0),
        (Mad, (0, 0), (0, 0), 1),
    ],
)
def test_answers_that_say_nothing_lower_the_score_and_are_counted(records, endpoint, mean, coverage, undefined):
    asking = explainer(endpoint(), NAMES)
    (found,) = evaluate({"top-and-random": records}, {"language-model": asking})
    row = found.row()
    assert mean[0] <= row["mean"] <= mean[1] and coverage[0] <= row["coverage"] <= coverage[1]
    assert row["undefined"] == undefined and row["dead"] == 0
    assert asking.simulator.problems.total() == (
        0 if endpoint is Silent else pytest.approx(2 * (1 - row["coverage"]) * 6400, abs=9)
    )


def test_some_neurons_are_explained_as_among_all(records):
    every, some = (
        evaluate({"random-only": held}, {"language-model": explainer(Oracle(), NAMES)})[0]
        for held in (records, records.neurons([[0], [1]], [[4, 1], [0, 2]]))
    )
    assert some.explanations.texts == ["w4", "w1", "w5", "w7"] and some.scores.correlation.shape == (2, 2)
    assert some.scores.correlation.equal(every.scores.correlation[[[0], [1]], [[4, 1], [0, 2]]])
