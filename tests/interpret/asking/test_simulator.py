import contextlib
import json
import math
import sqlite3

import pytest
import torch
from language_model_server import (
    EXPECTED,
    HIGH,
    LOW,
    TEXT,
    WORDS,
    Words,
    excerpts_of,
    foretold,
    last_token,
    next_token,
    prompt_of,
    quiet,
    understanding,
)

from cratelab.interpret.asking.answers import Cost
from cratelab.interpret.asking.local_endpoint import HuggingFaceEndpoint
from cratelab.interpret.asking.prompts import escape, simulation_prompt
from cratelab.interpret.asking.simulator import NO_NUMBER, LanguageModelSimulator
from cratelab.reading import NO_TOKEN

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("kind", ["chat", "completions", "completions in the shape of chat"])
def test_a_simulated_activation_is_the_expectation_of_what_the_server_writes(serve, connect, kind):
    def reply(path, body, n):
        return 200, {}, next_token(HIGH if "a" in last_token(body) else LOW, path, modern="shape" in kind)

    server = serve(reply)
    simulator = LanguageModelSimulator(connect(server, chat=kind == "chat"), announce=quiet, top=7)
    simulated = foretold(simulator, ["the letter a", "the same"])
    high, low = EXPECTED[True], EXPECTED[False]
    expected = [[[low, high, high], [high, low, 0]], [[low, low, high], [0, 0, 0]]]
    torch.testing.assert_close(simulated, torch.tensor([expected], dtype=torch.float64))
    assert not simulator.problems
    assert len(server.requests) == 8
    for path, body, _ in server.requests:
        assert path == ("/v1/chat/completions" if kind == "chat" else "/v1/completions")
        assert body["model"] == "tiny" and body["max_tokens"] == 1
        assert (body["top_logprobs"] if kind == "chat" else body["logprobs"]) == 7
        assert "Neuron 2: the " in prompt_of(body)


def test_hostile_tokens_stay_in_their_row(serve, connect):
    server = serve(understanding)
    every = list(range(len(WORDS)))
    simulator = LanguageModelSimulator(connect(server, chat=False, concurrency=1), announce=quiet)
    simulated = foretold(simulator, ["tab\there\n<s>"], excerpts_of([[every]]))
    assert simulated[0, 0, 0].tolist() == pytest.approx([EXPECTED["a" in escape(word)] for word in WORDS])
    *rows, last = server.requests[-1][1]["prompt"].partition("Neuron 2: ")[2].split("\n")
    assert rows[0] == r"tab\there\n<s\>" and len(rows) == len(WORDS) and last == "\t"
    assert [row.split("\t") for row in rows[1:]] == [[escape(word), "unknown"] for word in WORDS[:-1]]
    assert len({escape(word) for word in WORDS}) == len(WORDS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"choices": [{"text": "7", "logpr', "the answer is not JSON"),
        (b"\xff\xfe", "the answer is not JSON"),
        (b"[" * 100_000, "the answer is not JSON"),
        (b"<html>log in</html>", "the answer is not JSON"),
        ({"choices": []}, "the answer has another shape"),
        ([], "the answer has another shape"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": "high"}]}}]}, "the answer has another shape"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": -(10**400)}]}}]}, "the answer has another shape"),
        ({"choices": [{"logprobs": {"content": []}}]}, "the answer has another shape"),
        ({"choices": [{"text": "7", "logprobs": None}]}, "the answer has no log-probabilities"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": math.nan}]}}]}, "a log-probability that is none"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": 3.0}]}}]}, "a log-probability that is none"),
        ({"choices": [{"logprobs": {"top_logprobs": [{"7": -math.inf}]}}]}, NO_NUMBER),
        (next_token({" the": 0.9, "10": 0.05, "²": 0.05}), NO_NUMBER),
    ],
)
def test_an_answer_that_says_nothing_is_counted_and_not_guessed(serve, connect, content, reason):
    server = serve(lambda path, body, n: (200, {}, content if last_token(body) == " cat" else next_token(LOW)))
    simulator = LanguageModelSimulator(connect(server, chat=False), announce=quiet)
    simulated, coverage = simulator.simulate(["one", "two"], TEXT, Words())
    low = EXPECTED[False]
    assert simulated[0, :, 0].tolist() == [pytest.approx([low, 0, low]), pytest.approx([low, low, 0])]
    assert simulator.problems == {reason: 2}
    assert coverage[0].tolist() == pytest.approx([4 / 5, 2 / 3])


def test_a_kept_answer_of_another_length_is_counted_and_not_guessed(serve, connect, tmp_path):
    """An answer file from elsewhere may hold anything under the right key."""
    server, cache = serve(lambda *request: (200, {}, next_token(LOW))), tmp_path / "answers.sqlite"
    simulator = LanguageModelSimulator(connect(server, chat=False), cache=cache, announce=quiet)
    simulated = foretold(simulator, ["one"])
    with contextlib.closing(sqlite3.connect(cache)) as file, file:
        keys = file.execute("SELECT key FROM answers LIMIT 2").fetchall()
        for (key,), odd in zip(keys, ['{"next": []}', "{}"], strict=True):
            file.execute("UPDATE answers SET answer = ? WHERE key = ?", (odd, key))
    again = foretold(simulator, ["one"])
    assert int((again == 0).sum()) == int((simulated == 0).sum()) + 2
    assert simulator.problems == {"the answer says nothing of this place": 2}


def test_a_neuron_without_explanation_is_undefined_and_not_asked_about(serve, connect):
    server = serve(understanding)
    simulator = LanguageModelSimulator(connect(server), announce=quiet)
    simulated, coverage = simulator.simulate(["the letter a", None], TEXT, Words())
    assert simulated[0, 1].isnan().all() and not simulated[0, 0].isnan().any() and len(server.requests) == 5
    assert coverage.tolist() == [[1, 0]] and not simulator.problems
    with pytest.raises(ValueError, match="1 explanations cannot be of the 2 neurons"):
        simulator.simulate(["the letter a"], TEXT, Words())


def test_ten_is_a_one_followed_by_a_zero(serve, connect):
    """Of the 0.5 for 1, a fifth goes on with 0: 0.1 for 10."""

    def reply(path, body, n):
        if body["prompt"].endswith("\t1"):
            return 200, {}, next_token({"\n": 0.8, "0": 0.2})
        return 200, {}, next_token({"1": 0.5, "2": 0.5} if "a" in last_token(body) else {"10": 0.25, "1": 0.75})

    server = serve(reply)
    simulator = LanguageModelSimulator(connect(server, chat=False), announce=quiet, ten=True)
    simulated = foretold(simulator, ["one"])
    high, low = 0.4 * 1 + 0.5 * 2 + 0.1 * 10, 0.25 * 10 + 0.75
    torch.testing.assert_close(simulated[0, 0, 0], torch.tensor([low, high, high], dtype=torch.float64))
    assert len(server.requests) == 5 + 3 and not simulator.problems
    assert " storm\t10\n" in server.requests[0][1]["prompt"]
    with pytest.raises(ValueError, match="ten needs an endpoint that continues"):
        LanguageModelSimulator(connect(server, chat=True), ten=True)


def test_a_useless_server_is_not_asked_to_the_end(serve, connect):
    server = serve(lambda *request: (200, {}, b"<html>"))
    simulator = LanguageModelSimulator(connect(server, concurrency=2), announce=quiet)
    with pytest.raises(ValueError, match=r"the first 20 answers .* of no use \(the answer is not JSON\)"):
        foretold(simulator, ["one"], excerpts_of([[[0, 1, 2] * 40]]))
    assert len(server.requests) < 60


def test_no_question_is_asked_twice(serve, connect, tmp_path):
    server = serve(understanding)
    cache = tmp_path / "folder" / "answers.sqlite"
    simulator = LanguageModelSimulator(connect(server), cache=cache, announce=quiet)
    first = foretold(simulator, ["one"])
    assert len(server.requests) == 5
    second = foretold(LanguageModelSimulator(connect(server), cache=cache, announce=quiet), ["one"])
    assert len(server.requests) == 5 and second.equal(first)
    foretold(LanguageModelSimulator(connect(server, "other"), cache=cache, announce=quiet), ["one"])
    assert len(server.requests) == 10


def test_problems_are_asked_again_in_the_next_run(serve, connect, tmp_path):
    server = serve(lambda path, body, n: (200, {}, b"{") if n <= 2 else understanding(path, body, n))
    simulator = LanguageModelSimulator(connect(server), cache=tmp_path / "answers", announce=quiet)
    foretold(simulator, ["one"])
    assert simulator.problems == {"the answer is not JSON": 2} and len(server.requests) == 5
    foretold(simulator, ["one"])
    assert simulator.problems.total() == 2 and len(server.requests) == 7


def test_the_cost_is_known_and_announced_before_anything_is_sent(serve, connect, tmp_path, capsys):
    server, cache = serve(understanding), tmp_path / "answers"
    simulator = LanguageModelSimulator(connect(server), cache=cache, prices=(2.0, 10.0))
    cost = simulator.estimate_cost(["one", "two"], TEXT, Words())
    assert (cost.requests, cost.cached, cost.completion_tokens) == (8, 0, 8)
    assert server.requests == [] and not cache.exists()
    foretold(simulator, ["one", "two"])
    assert len(server.requests) == 8 and capsys.readouterr().out == f"{cost}\n"
    texts = [prompt_of(body) for _, body, _ in server.requests]
    assert cost.prompt_tokens == sum(map(simulator.endpoint.count_tokens, texts))
    assert 0.7 < cost.prompt_tokens / sum(len(text) / 4 for text in texts) < 1.5
    assert cost.money == pytest.approx((cost.prompt_tokens * 2 + 8 * 10) / 1e6)
    assert simulator.estimate_cost(["one", "two"], TEXT, Words()).cached == 8
    assert str(Cost(1000, 2, 3_000_000, 4, (1.0, 5.0))) == (
        "1,000 requests (2 more are cached), about 3,000,000 prompt tokens, at most 4 completion tokens: "
        "3.00 at 1.0 and 5.0 a million"
    )


def test_one_forward_pass_is_one_pass_a_token(local):
    """Against the model's own logits after each prefix, tokenised byte by byte but for the joined rows."""
    simulator = LanguageModelSimulator(local, announce=quiet)
    assert simulator.estimate_cost(["one"], TEXT.neurons(0, 0), Words()).requests == 2
    simulated = foretold(simulator, ["one"])
    digits = [local.tokenizer(str(n))["input_ids"][0] for n in range(10)]
    for excerpt, words in enumerate([["sun", " cat", " sat"], [" sat", "sun"]]):
        pieces = simulation_prompt("one", words)
        for i in range(len(words)):
            ids = [token for piece in pieces[: i + 1] for token in local.tokenizer(piece)["input_ids"]]
            assert local.tokenizer.decode(ids[-1:]) == "\t"
            with torch.no_grad():
                p = local.model(torch.tensor([ids])).logits[0, -1].double()[digits].softmax(0)
            assert float(simulated[0, 0, excerpt, i]) == pytest.approx(float(p @ torch.arange(10.0).double()), rel=1e-4)
    assert simulated[0, 0, 1, 2] == 0 and not simulator.problems


def test_a_local_model_splits_ten(local):
    simulator = LanguageModelSimulator(local, announce=quiet, ten=True)
    simulated = foretold(simulator, ["one"])
    assert (simulated[TEXT.tokens[:, :1] != NO_TOKEN] > 0).all() and (simulated <= 10).all()


def test_a_local_model_is_asked_for_numbers_however_unlikely(local, folder):
    """A number was among the 20 likeliest tokens at few places of a small model, and the others counted as 0."""
    shy = HuggingFaceEndpoint(folder, device="cpu")
    with torch.no_grad():  # the same model, but for a bias of -50 on what can be told from a number
        shy.model.lm_head.register_forward_hook(lambda module, args, logits: logits + shyness)
    shyness = torch.zeros(len(local.tokenizer))
    shyness[[local.tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)]] = -50
    simulators = [LanguageModelSimulator(endpoint, announce=quiet, top=1) for endpoint in (shy, local)]
    found, expected = (foretold(simulator, ["one"]) for simulator in simulators)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not simulators[0].problems and (found > 0).sum() == 5


def test_of_an_answer_the_numbers_are_kept_and_nothing_else(serve, connect, local, tmp_path):
    """A place of a local model is eleven numbers of about 16 bytes at most, and the file no key twice."""
    simulators = (
        LanguageModelSimulator(local, cache=tmp_path / "local", announce=quiet),
        LanguageModelSimulator(
            connect(serve(understanding), chat=False), cache=tmp_path / "server", announce=quiet, top=7
        ),
    )
    places = []
    for simulator in simulators:
        foretold(simulator, ["the letter a"])
        with contextlib.closing(sqlite3.connect(simulator.cache)) as file:
            rows = [answer for (answer,) in file.execute("SELECT answer FROM answers")]
            assert file.execute("SELECT COUNT(*) FROM sqlite_master WHERE type = 'index'").fetchone() == (0,)
        places.append([place for row in rows for place in json.loads(row)["next"]])
        assert len(places[-1]) == 5 and sum(map(len, rows)) < 5 * 11 * 17 + 20 * len(rows)
    assert all([number for number, _ in place] == [str(n) for n in range(10)] for place in places[0])
    assert {number for place in places[1] for number, _ in place} == {"0", "1", "7", "8"}  # not " the"
