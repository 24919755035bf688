import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from cratelab import plots
from cratelab.corpora import tokenizers
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import TokenExplainer
from cratelab.interpret.records import Records
from cratelab.interpret.scores import score
from cratelab.viewers.drawing import luminance, shades
from cratelab.viewers.neurons import viewer

VOID = {"meta", "br", "img", "input", "link"}
HOSTILE = [
    *("<script>alert(1)</script>", "</script><!--", '"', "'", "&lt;", "\u202eevil", "\u2066", "\x1b[0m", "\x00"),
    *("\ud800", "\n", "\t", " ", "\r\n", " the", "שלום", "\u0301", "\u2028", "\xa0", "", "{label}", "ROOT"),
]
SHOWN = [
    *(
        "<script>alert(1)</script>",
        "</script><!--",
        '"',
        "'",
        "&lt;",
        "\\u202eevil",
        "\\u2066",
        "\\u001b[0m",
        "\\u0000",
    ),
    *("\\ud800", "⏎", "⇥", "␣", "\\u000d⏎", " the", "שלום", "◌\u0301", "\\u2028", "\\u00a0", "∅", "{label}", "ROOT"),
]


class Words:
    """A tokenizer of any words, whose tokens carry their own spaces."""

    name, eot_token = "words", 0

    def __init__(self, words):
        self.words, self.n_vocab = words, len(words)

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


class Says:
    def __init__(self, words):
        self.words = words

    def describe(self, layer, neuron, tokenizer):
        return self.words


class Page(HTMLParser):
    """What a browser would read: balanced elements, the text of each, and the attributes of all."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.elements = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def text(self, tag):
        return [text for found, text in self.texts if found == tag]

    @property
    def data(self):
        return json.loads(self.text("script")[0])


def records(n_words=22, h=3, k=4, w=None, n_active=0, seed=0) -> Records:
    """Random ones in two layers; neuron (1, 2) is dead."""
    draw = torch.Generator(device="cpu").manual_seed(seed)
    w = w or n_words

    def excerpts(k):
        shape = 2, h, k, w
        words = (torch.arange(k * w).reshape(k, w) % n_words).expand(shape).int().cpu()
        values = 3 * torch.rand(shape, generator=draw, device="cpu")
        values[1, 2] = 0
        starts = (w * torch.arange(k, device="cpu")).expand(shape[:3]).clone()
        return Excerpts(words.clone(), values, starts, torch.full(shape[:3], w // 2, device="cpu"))

    top, random, active = excerpts(k), excerpts(k), excerpts(n_active)
    for one in top, active:
        one.tokens[1, 2], one.starts[1, 2] = -1, -1
    maximum = torch.stack([e.activations.flatten(2).amax(2) for e in (top, random)]).amax(0).double()
    return Records(top, random, active, maximum / 2, maximum, maximum.sign() / 4, maximum, n_tokens=12_345)


ALL = [(layer, index) for layer in range(2) for index in range(3)]


def test_hostile_tokens_are_shown_and_do_nothing(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>\u202e\ud800"
    view = viewer(records(), Words(HOSTILE), ALL, {evil: Says(evil)}, title=evil)
    view.save(tmp_path / "page.html")
    saved = (tmp_path / "page.html").read_text(encoding="utf8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    for page in Page(view.html), Page(saved):
        assert page.data["tokens"] == SHOWN
        assert [text for text in page.text("bdi") if text in SHOWN][: len(SHOWN)] == SHOWN
        assert [tag for tag, _ in page.elements].count("script") == 2
        assert not any(name.startswith("on") or name in ("src", "href") for _, a in page.elements for name in a)
    shown = "</script><img src=x onerror=alert(1)>\\u202e\\ud800"
    assert shown in Page(saved).text("title") and shown in Page(saved).text("b") and shown in Page(saved).text("bdi")
    assert all(character.isprintable() or character == "\n" for character in saved)


def test_bytes_that_are_no_character_are_escapes():
    tokenizer = tokenizers.byte_encoding()
    held = records(n_words=2)
    held.top.tokens[held.top.tokens == 0] = 0xE2
    held.top.tokens[held.top.tokens == 1] = 0x0A
    assert {"\\xe2", "⏎"} <= set(Page(viewer(held, tokenizer, [(0, 0)]).html).data["tokens"])


def test_words_have_a_space_between_and_tokens_with_their_own_have_none():
    words = [f"w{i}" for i in range(5)]
    for tokenizer, gap in (tokenizers.WordEncoding(words), " "), (Words(words), ""):
        page = Page(viewer(records(5, n_active=30), tokenizer, ALL).html)
        assert page.data["gap"] == gap and (gap in page.text("span")) == bool(gap)


def test_data_hold_every_neuron_and_excerpt():
    held = records(7, n_active=30)
    page = Page(viewer(held, Words(HOSTILE), ALL[::-1], n_excerpts=3).html)
    assert page.text("option") == [f"layer {layer}, neuron {index}" for layer, index in ALL[::-1]]
    assert page.data["kinds"] == ["strongest", "random", "active"]
    assert [[len(part) for part in one["parts"]] for one in page.data["neurons"]] == [[0, 3, 0]] + [[3, 3, 3]] * 5
    places, digits = page.data["neurons"][-1]["parts"][1][0]
    assert [page.data["tokens"][place] for place in places] == SHOWN[:7]
    expected = 100 * held.random.activations[0, 0, 0] / held.maximum[0, 0]
    assert list(bytes.fromhex(digits)) == expected.round().int().tolist()
    highest = [max(bytes.fromhex(digits)) for _, digits in page.data["neurons"][-1]["parts"][2]]
    assert highest == sorted(highest, reverse=True)


def test_equal_records_give_equal_bytes_and_others_another_name():
    def name(view):
        return re.search("neurons-[0-9a-f]{10}", view.html)[0]

    first, again = (viewer(records(), Words(HOSTILE), ALL) for _ in range(2))
    assert first.html == again.html
    noisy = records()
    noisy.random.activations *= 1 + 1e-6
    assert viewer(noisy, Words(HOSTILE), ALL).html == first.html
    others = viewer(records(seed=1), Words(HOSTILE), ALL), viewer(records(), Words(HOSTILE), ALL, colour=plots.GPT2)
    assert len({name(first), *map(name, others)}) == 3


def test_thirty_neurons_stay_small():
    held = records(4096, h=15, k=8, w=64)  # sixteen excerpts of each, a different token at every place
    view = viewer(held, Words([f" word{i}" for i in range(4096)]), [(i % 2, i // 2) for i in range(30)])
    assert len(view.html.encode()) < 600_000


def test_a_dead_neuron_says_so():
    page = Page(viewer(records(n_active=5), Words(HOSTILE), [(1, 2)]).html)
    assert page.text("p").count("No excerpt: the neuron is never active in the 12,345 tokens read.") == 2
    assert "maximum 0" in page.text("span") and not page.text("details")


def test_explanations_stand_beside_their_scores():
    held = records()
    explanations = TokenExplainer().explain(held.random)
    scores = score(explanations.simulate(held.random)[0], held.random)
    view = viewer(held, Words(HOSTILE), [(0, 1), (1, 2)], {"token": explanations}, {"token": scores, "other": scores})
    page = Page(view.html)
    value = f"score {float(scores.correlation[0, 1]):.2f}"
    assert [t for t in page.text("span") if "score" in t] == [value] * 2 + ["no score: the neuron is constant"] * 2
    assert "never active in the excerpts" in page.text("bdi")


@pytest.mark.parametrize("colour", [plots.CRATE, plots.GPT2, "#000000", "#808080"])
def test_text_stands_out_from_every_shade(colour):
    for ground, ink in shades(colour):
        dark, light = sorted((luminance(bytes.fromhex(ground[1:])), 1.0 if ink == "#fff" else 0.0))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert shades(colour)[0][0] == "#ffffff" and shades(colour)[-1][0] == colour.lower()


def test_errors_say_what_is_wrong():
    held, words = records(), Words(HOSTILE)
    for neuron in (2, 0), (0, 3), (-1, 0):
        with pytest.raises(ValueError, match=re.escape(f"from 0 to 1 and a neuron from 0 to 2; got {neuron}")):
            viewer(held, words, [(0, 0), neuron])
    with pytest.raises(ValueError, match="got none"):
        viewer(held, words, [])
    with pytest.raises(ValueError, match="n_excerpts must be at least 1; got 0"):
        viewer(held, words, ALL, n_excerpts=0)
    with pytest.raises(ValueError, match="#rrggbb"):
        viewer(held, words, ALL, colour="red")
    with pytest.raises(ValueError, match="token 5, which the tokenizer words lacks"):
        viewer(held, Words(HOSTILE[:5]), ALL)
    with pytest.raises(ValueError, match=re.escape("of (2, 2) layers and neurons, the records of (2, 3)")):
        part = held.random.map(lambda value: value[:, :2])
        viewer(held, words, ALL, scores={"x": score(part.activations, part)})
    held.top, held.random = held.top[[]], held.random[[]]
    with pytest.raises(ValueError, match="hold no excerpts"):
        viewer(held, words, ALL)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["maximum", "mean", "variance", "density", "activations"])
def test_values_that_are_not_finite_leave_the_page_alive(field, value, tmp_path):
    held = records(n_active=5)
    held.variance = held.variance.clone()
    for spoilt in [held.top.activations, held.random.activations] if field == "activations" else [getattr(held, field)]:
        spoilt[0, 0] = value
    view = viewer(held, Words(HOSTILE), ALL, title=f"{value}")
    page = Page(view.html)

    def refuse(constant):
        raise AssertionError(f"a browser does not read {constant}")

    data = json.loads(page.text("script")[0], parse_constant=refuse)
    first, second = data["neurons"][:2]
    assert (first["max"] is None) == (field == "maximum") and second["max"] > 0
    if field == "maximum":
        assert f"maximum {value}" in page.text("span") and "?" in page.text("b")
    levels = [level for part in first["parts"] for _, digits in part for level in bytes.fromhex(digits)]
    assert max(levels) <= 100
    if field in ("maximum", "activations"):
        assert set(levels) <= ({100} if (field, value) == ("activations", torch.inf) else {0}) | set(levels[-22 * 5 :])
    view.save(tmp_path / "page.html")


# A document in which every element takes what the script does to it, and paragraphs are counted.
DOM = """
const page = JSON.parse(require('fs').readFileSync(0, 'utf8'));
let paragraphs = 0;
const element = tag => {
  paragraphs += tag === 'p';
  return {tag, dataset: {}, style: {}, append() {}, setAttribute() {}, addEventListener() {}, replaceWith() {},
    replaceChildren() {}, querySelector: () => null, cloneNode: () => element('clone'),
    querySelectorAll: () => [element('button'), element('button')]};
};
const pick = Object.assign(element('select'), {selectedIndex: 0});
const root = Object.assign(element('div'), {
  querySelector: what => ({script: {textContent: page.data}, select: pick}[what] || element(what)),
  querySelectorAll: () => Array.from({length: page.neurons}, element),
});
globalThis.document = {querySelectorAll: () => [root], createElement: element};
new Function(page.script)();
for (pick.selectedIndex = 1; pick.selectedIndex < page.neurons; pick.selectedIndex++) pick.onchange();
console.log(paragraphs);
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_runs_where_the_maximum_is_infinite():
    held = records(n_active=5)
    held.maximum[0, 0] = torch.inf
    data, script = Page(viewer(held, Words(HOSTILE), ALL).html).text("script")
    given = json.dumps({"data": data, "script": script, "neurons": len(ALL)})
    run = subprocess.run(["node", "-e", DOM], input=given, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and int(run.stdout) == 5 * 4 + 1, run.stderr  # the last neuron has no excerpt


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    view, path = viewer(records(), Words(HOSTILE), ALL), tmp_path / "page.html"
    view.save(path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        view.save(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["page.html"]
