"""All places of an excerpt in one request, by HTTP."""

import pytest
import torch
from language_model_server import TEXT, WORDS, Words, excerpts_of, foretold, quiet, understanding

from cratelab.interpret.asking.answers import Cost
from cratelab.interpret.asking.prompts import escape, simulation_prompt
from cratelab.interpret.asking.simulator import LanguageModelSimulator
from cratelab.reading import NO_TOKEN

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def one_by_one(tokenizer, text):
    """Every byte is a token: parts of a character decode to U+FFFD."""
    return [
        tokenizer.convert_tokens_to_ids(token)
        for token in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    ]


def whole(tokenizer, text):
    return tokenizer(text)["input_ids"]


def speak(local, encode=one_by_one, bos=(), offset=None, change=None):
    """A server of the API over this model: `change(choice, n)` what it does wrong."""
    tokenizer = local.tokenizer
    spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]

    def likeliest(row, following, k):
        best = row.topk(min(k, len(row)))
        pairs = zip([*best.indices.tolist(), following], [*best.values.tolist(), float(row[following])], strict=True)
        return {spelled[token]: value for token, value in pairs}

    def reply(path, body, n):
        ids = [*bos, *encode(tokenizer, body["prompt"])]
        with torch.no_grad():
            rows = local.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids.append(int(rows[-1].argmax()))
        tokens = [spelled[token] for token in ids]
        following = [likeliest(row, token, body["logprobs"]) for row, token in zip(rows, ids[1:], strict=True)]
        held = {
            "tokens": tokens,
            "top_logprobs": [None, *following],
            "text_offset": [sum(map(len, tokens[:i])) if offset is None else offset for i in range(len(tokens))],
        }
        held = held if body.get("echo") else {name: values[-1:] for name, values in held.items()}
        choice = {"index": 0, "text": "".join(held["tokens"]), "logprobs": held, "finish_reason": "length"}
        if change and body.get("echo"):
            choice = change(choice, n)
        return (200, {}, {"choices": [choice]}) if isinstance(choice, dict) else choice

    return reply


def read_directly(local, explanation, tokens, encode=one_by_one, bos=()):
    """The expectation after every prefix of a prompt, from the logits of the model."""
    digits = [local.tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)]
    pieces, expected = simulation_prompt(explanation, [escape(WORDS[token]) for token in tokens]), []
    for i in range(len(pieces)):
        ids = [*bos, *encode(local.tokenizer, "".join(pieces[: i + 1]))]
        with torch.no_grad():
            p = local.model(torch.tensor([ids])).logits[0, -1].double()[digits].softmax(0)
        expected.append(float(p @ torch.arange(10.0).double()))
    return pytest.approx(expected, rel=1e-4)


STRANGE = [0, 6, 9, 12, 2]  # among them a special token, one that is three tokens here, and one of no letters


def early(by):
    """As llama-cpp-python for models without a token at the beginning, by one: a row says what follows its token."""

    def change(choice, n):
        tokens, rows = choice["logprobs"]["tokens"][:-1], choice["logprobs"]["top_logprobs"]
        return spoil(choice, tokens=tokens, top_logprobs=[None, *rows[1 + by :], {}][: len(tokens)])

    return change


@pytest.mark.parametrize(
    ("bos", "offset", "change"),
    [((), None, None), ((257,), None, None), ((), -1, None), ((), None, early(1))],
    ids=["one", "vLLM", "SGLang", "llama-cpp-python"],
)
def test_an_excerpt_is_one_request_where_the_server_repeats_prompts(serve, connect, local, bos, offset, change):
    """As vLLM, whose offsets count the special token, SGLang, which has none, and one whose rows come too early."""
    server = serve(speak(local, bos=bos, offset=offset, change=change))
    simulator = LanguageModelSimulator(connect(server, chat=False, echo=True), announce=quiet, top=300)
    excerpts = excerpts_of([[STRANGE, [2, 0, 1, NO_TOKEN, NO_TOKEN]]])
    simulated = foretold(simulator, ["one"], excerpts)
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", STRANGE, bos=bos)
    assert simulated[0, 0, 1, :3].tolist() == read_directly(local, "one", [2, 0, 1], bos=bos)
    assert not simulator.problems and len(server.requests) == 2 + 2
    assert [body.get("echo") for _, body, _ in server.requests] == [None, True, True, True]
    assert all(body["max_tokens"] == 1 for _, body, _ in server.requests)


def refuse(status, message):
    return lambda choice, n: (status, {}, {"error": {"message": message}})


def spoil(choice, **changed):
    return choice | {"logprobs": choice["logprobs"] | changed}


def part(*ends):
    """Only some of the places, counted from the prompt's first token."""
    return lambda choice, n: choice | {"logprobs": {k: held[slice(*ends)] for k, held in choice["logprobs"].items()}}


def likeliest(change):
    return lambda choice, n: spoil(choice, top_logprobs=change(choice["logprobs"]["top_logprobs"]))


def spelled(change):
    return lambda choice, n: spoil(choice, tokens=change(choice["logprobs"]["tokens"]))


def shifted_by_a_row(choice, n):
    """Something with a tab before the prompt."""
    held = choice["logprobs"]
    return spoil(choice, tokens=["\t", *held["tokens"]], top_logprobs=[None, *held["top_logprobs"]])


PLACES = "does not repeat the prompt with a token that ends at each place"

NONE = "the answer has no log-probabilities"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (None, PLACES),  # but the server's tokenizer joins the tab to what follows
        (refuse(400, "Setting 'echo' and 'logprobs' at the same time is not supported"), "HTTP 400: Setting 'echo'"),
        (refuse(500, "Only no echo is supported"), "HTTP 500: Only no echo"),
        (refuse(403, "not for you"), "HTTP 403: not for you"),
        (lambda choice, n: choice | {"logprobs": None}, NONE),
        (likeliest(lambda rows: [None] * len(rows)), NONE),
        (part(-1, None), PLACES),  # `echo` is ignored
        (part(-40, None), PLACES),
        (likeliest(lambda rows: rows[:200]), PLACES),
        (shifted_by_a_row, PLACES),
        (spelled(lambda tokens: [f"token_id:{len(token)}" for token in tokens]), PLACES),
        (spelled(lambda tokens: 7), "the answer has another shape"),
        (lambda choice, n: choice | {"logprobs": {"content": []}}, "the answer has another shape"),
        (lambda choice, n: (200, {}, b"{"), "the answer is not JSON"),
        (likeliest(lambda rows: [*rows[1:], {}]), "they are not those of the same place"),
        (early(2), PLACES),
        (early(0), PLACES),  # as `early(1)` in its tokens, and not in its rows
    ],
)
def test_a_server_that_does_not_repeat_prompts_rightly_is_asked_for_each_token(serve, connect, local, change, reason):
    encode = one_by_one if change else whole
    server, told = serve(speak(local, encode, change=change)), []
    endpoint = connect(server, chat=False, echo=True)
    simulator = LanguageModelSimulator(endpoint, announce=told.append, top=300)
    with pytest.warns(UserWarning, match=rf"{reason}.*so every token is a request. echo=False does not try"):
        simulated = foretold(simulator, ["one"], excerpts_of([[[0, 1, 2]]]))
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", [0, 1, 2], encode)
    tried = 4 if "500" in reason else 2  # what fails is tried again
    assert told[0].requests == 3 and len(server.requests) == tried + 3 and not server.requests[-1][1].get("echo")


def test_an_excerpt_whose_answer_is_spoilt_is_counted_and_not_guessed(serve, connect, local, tmp_path):
    """Of two excerpts the second, in the first run; it is asked for again in the next."""
    server = serve(speak(local, change=lambda choice, n: part(-1, None)(choice, n) if n == 4 else choice))
    endpoint = connect(server, chat=False, echo=True, concurrency=1)
    simulator = LanguageModelSimulator(endpoint, cache=tmp_path / "answers", announce=quiet, top=300)
    excerpts = excerpts_of([[[0, 1, 2], [2, 2, NO_TOKEN]]])
    simulated = foretold(simulator, ["one"], excerpts)
    assert simulated[0, 0, 0].tolist() == read_directly(local, "one", [0, 1, 2])
    assert simulated[0, 0, 1].tolist() == [0, 0, 0] and simulator.problems == {f"the answer {PLACES}": 2}
    again = foretold(simulator, ["one"], excerpts)
    assert again[0, 0, 1, :2].tolist() == read_directly(local, "one", [2, 2])
    assert again[0, 0, 0].equal(simulated[0, 0, 0]) and len(server.requests) == 2 + 2 + 1


def test_ten_is_read_likewise_from_repeated_prompts(serve, connect, local):
    server, found = serve(speak(local)), {}
    for echo in (True, False):
        endpoint = connect(server, chat=False, echo=echo)
        simulator = LanguageModelSimulator(endpoint, announce=quiet, top=300, ten=True)
        found[echo] = foretold(simulator, ["one"], excerpts_of([[[0, 1, 2]]]))
        assert not simulator.problems
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=0)
    assert len(server.requests) == (2 + 1 + 3) + (3 + 3)


def test_the_cost_is_that_of_the_mode_that_will_be_used(serve, connect, local, tmp_path):
    server, told = serve(speak(local)), []
    settings = dict(cache=tmp_path / "answers", prices=(2.0, 10.0), top=9)

    def stop(cost):
        told.append(cost)
        raise KeyboardInterrupt

    endpoint = connect(server, chat=False, echo=True)
    with pytest.raises(KeyboardInterrupt):
        foretold(LanguageModelSimulator(endpoint, **settings, announce=stop), ["one", "two"])
    assert len(server.requests) == 2  # the trial
    simulator = LanguageModelSimulator(endpoint, **settings, announce=told.append)
    foretold(simulator, ["one", "two"])
    texts = [body["prompt"] for _, body, _ in server.requests[2:]]
    assert told[0] == told[1] == Cost(3, 0, sum(map(endpoint.count_tokens, texts)), 3, (2.0, 10.0))
    assert len(texts) == 3 and told[0].money == pytest.approx((told[0].prompt_tokens * 2 + 3 * 10) / 1e6)
    again = connect(server, chat=False, echo=True)
    foretold(LanguageModelSimulator(again, **settings, announce=told.append), ["one", "two"])
    assert told[2].cached == 3 and len(server.requests) == 5 + 2  # nothing but another trial
    each = LanguageModelSimulator(connect(server, chat=False), announce=quiet)
    assert each.estimate_cost(["one", "two"], TEXT, Words()).requests == 8 and len(server.requests) == 7


def test_only_a_model_that_continues_texts_is_tried_and_a_dead_server_is_no_answer(serve, connect):
    server = serve(understanding)
    assert not connect(server, chat=True, echo=True).all_at_once and not connect(server, chat=False).all_at_once
    assert server.requests == []
    with pytest.raises(ConnectionError, match="no server answers"):
        connect("http://127.0.0.1:9/v1", chat=False, echo=True).all_at_once  # noqa: B018
    unknown = serve(lambda *request: (404, {}, {"error": {"message": "no such model"}}))
    with pytest.raises(ValueError, match="no such model"):
        connect(unknown, chat=False, echo=True).all_at_once  # noqa: B018
