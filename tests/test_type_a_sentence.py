"""The page "Type a sentence": its script computes what the library computes, and shows it safely (in a browser)."""

import dataclasses
import json
import re

import codes_page
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from javascript import engine
from notebooks import BOOK
from torch.nn.functional import cross_entropy

from cratelab.corpora.prepare import tinyworld_encoding
from cratelab.crate import Crate
from cratelab.experiments.reference_models import load_reference
from cratelab.ista import ista
from cratelab.reading import hooked

SCRIPT = BOOK / "_static" / "type_a_sentence.js"
TRAINED = 0.1, 0.1, 2
MOVED = (0, 0.1, 2), (1, 0.1, 2), (3, 0.3, 1), (0.1, 0.01, 10), (0.5, 0.05, 4), (0.1, 0.1, 3), (0.2, 0.3, 10)


@pytest.fixture(scope="module")
def model() -> Crate:
    return load_reference("crate", "toy", 0).cpu()


@pytest.fixture(scope="module")
def committed() -> str:
    return codes_page.MODEL.read_text(encoding="utf8")


@pytest.fixture(scope="module")
def page(committed):
    """A function that calls one of the script's, with the page's own model as `model` where it is named so."""
    data = re.fullmatch(r'<script type="application/json" id="type-a-sentence-model">(.*)</script>\n', committed)[1]
    javascript = engine(SCRIPT)
    javascript.eval(f"const model = typeASentence.load({data})")
    # Typed arrays travel as lists.
    javascript.eval(
        "const plain = (x) => ArrayBuffer.isView(x) ? Array.from(x) : Array.isArray(x) ? x.map(plain) : "
        "x && typeof x === 'object' ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)])) : x;"
        "const typed = (x) => Array.isArray(x) && x.length > 99 ? Float64Array.from(x) : x;"
        "const run = (name, ...inputs) => plain(typeASentence[name](...inputs.map(typed)));"
        "const ask = (name, ...inputs) => plain(typeASentence[name](model, ...inputs));"
    )
    return javascript.call


def by_torch(model: Crate, tokens: list[int], lam: float, step_size: float, n_steps: int, dtype=torch.float64):
    """Codes of each layer and logits, of the library's model with other constants."""
    config = dataclasses.replace(model.config, lam=lam, step_size=step_size, n_steps=n_steps)
    moved = Crate.with_weights(config, model.state_dict(), "the packaged model").to(dtype)
    codes = []
    hooks = [(block.neurons, lambda module, inputs, output: codes.append(output[0])) for block in moved.blocks]
    with torch.no_grad(), hooked(*hooks):
        return codes, moved(torch.tensor([tokens], device="cpu"))[0]


def by_page(page, tokens: list[int], lam: float, step_size: float, n_steps: int):
    found = page("ask", "forward", tokens, {"lam": lam, "stepSize": step_size, "steps": n_steps})
    codes = [torch.tensor(layer["codes"], dtype=torch.float64).view(len(tokens), -1) for layer in found["layers"]]
    return codes, torch.tensor(found["logits"], dtype=torch.float64).view(len(tokens), -1), found["layers"]


def tokens_of(name: str) -> list[int]:
    return tinyworld_encoding().encode_ordinary(f"<begin> {codes_page.SENTENCES[name]}")


def loss_of(logits: torch.Tensor, tokens: list[int]) -> float:
    return cross_entropy(logits[:-1], torch.tensor(tokens[1:])).item()


def test_the_page_holds_the_packaged_model(model, committed):
    assert committed == codes_page.fragment(model), "run `python book/codes_page.py`"
    assert len(committed) < 260_000 and codes_page.PICTURE.stat().st_size < 100_000
    assert committed.count("<") == 2  # nothing in it ends the script


def test_what_half_precision_cannot_hold_is_refused(model):
    other = Crate.with_weights(model.config, model.state_dict(), "a copy")
    other.norm.bias.data[3] = 1 / 3
    with pytest.raises(ValueError, match="half precision"):
        codes_page.packed(other)


def test_weights_arrive_bit_for_bit(model, page):
    sent = page("plain", []) == [] and page("eval", "plain(model.tensors)")
    assert list(sent) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert (torch.tensor(sent[name]).view_as(tensor) == tensor).all(), name


@pytest.mark.parametrize("constants", [TRAINED, *MOVED])
@pytest.mark.parametrize("sentence", codes_page.SENTENCES)
def test_codes_and_logits_are_those_of_the_library(model, page, sentence, constants):
    tokens = tokens_of(sentence)
    codes, logits, _ = by_page(page, tokens, *constants)
    for dtype, within in (torch.float64, 1e-10), (torch.float32, 1e-5):  # of the largest value, or of 1
        expected, scores = by_torch(model, tokens, *constants, dtype)
        for one, other in zip([*codes, logits], [*expected, scores], strict=True):
            assert (one - other).abs().max() < within * max(1, other.abs().max())
    if constants == TRAINED:
        assert max((one - other).abs().max() for one, other in zip(codes, expected, strict=True)) < 3e-6


def test_longest_text_and_shortest(model, page):
    for tokens in [26] * model.config.context, [26]:
        (codes, logits, _), (expected, scores) = by_page(page, tokens, *TRAINED), by_torch(model, tokens, *TRAINED)
        for one, other in zip([*codes, logits], [*expected, scores], strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_losses_are_cross_entropies(model, page):
    tokens = tokens_of("law")
    _, logits = by_torch(model, tokens, *TRAINED)
    first, *rest = page("run", "losses", logits.flatten().tolist(), tokens)
    expected = cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    assert first is None
    torch.testing.assert_close(torch.tensor(rest, dtype=torch.float64), expected, atol=1e-10, rtol=0)
    softmax = torch.tensor(page("run", "softmax", logits[3].tolist()), dtype=torch.float64)
    torch.testing.assert_close(softmax, logits[3].softmax(-1), atol=1e-12, rtol=0)


def test_chance_is_ista_in_a_dictionary_as_training_starts(model, page):
    atoms = torch.tensor(page("run", "randomAtoms", 256, 64), dtype=torch.float64).view(256, 64)
    assert atoms.abs().max() <= (6 / 64) ** 0.5 and abs(atoms.var() / (2 / 64) - 1) < 0.02 and abs(atoms.mean()) < 3e-3
    assert abs(torch.linalg.matrix_norm(atoms, 2) ** 2 - 18) < 1  # as chapter 4 finds for Kaiming's rule
    given_to_ista = by_page(page, tokens_of("law"), 0.5, 0.1, 2)[2][0]["given"]
    inputs = torch.tensor(given_to_ista, dtype=torch.float64)
    how = {"lam": 0.5, "stepSize": 0.1, "steps": 2}
    codes = torch.tensor(page("run", "ista", given_to_ista, atoms.flatten().tolist(), 64, how), dtype=torch.float64)
    expected = ista(inputs.view(-1, 64), atoms.mT, 0.1, 0.5, 2)
    torch.testing.assert_close(codes.view(-1, 256), expected, atol=1e-10, rtol=0)
    assert page("run", "active", codes.tolist(), 256) == (expected > 0).sum(-1).tolist()


def test_neurons_are_sorted_by_first_use_or_size(page):
    codes = [0.0, 0.2, 0.0, 0.3, 0.9, 0.1, 0.0, 0.0]  # two tokens, four neurons
    by = {kind: page("eval", f"typeASentence.order(Float64Array.from({codes}), 4, '{kind}').join()") for kind in ORDERS}
    assert by == ORDERS
    assert page("run", "largest", [0.1, 0.5, 0.3, 0.5], 3) == [1, 3, 2]


ORDERS = {"number": "0,1,2,3", "first": "3,1,0,2", "largest": "0,3,1,2"}


def library_tokens(text: str) -> list[tuple[str, int]]:
    encoding = tinyworld_encoding()
    known = set(encoding.vocabulary)
    return [(word, encoding.encode_ordinary(word)[0] if word in known else -1) for word in text.split()]


PIECES = st.one_of(
    st.sampled_from([*tinyworld_encoding().vocabulary, "Judge", "cell.", "constructor", "__proto__", "toString"]),
    st.sampled_from([chr(i) for i in range(0x3100) if chr(i).isspace()] + ["\ufeff", "\u200b", "\u180e", "\r\n"]),
    st.text(max_size=5),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=12).map("".join))
@example(" ".join(["constructor", "__proto__", "toString", "valueOf", "the"]))
@example(" ".join(tinyworld_encoding().vocabulary))
def test_words_are_those_of_the_library(page, text):
    found = [(each["word"], each["token"]) for each in page("ask", "encode", text)]
    assert found == library_tokens(text)


@pytest.mark.parametrize("apart", [chr(i) for i in range(0x3100) if chr(i).isspace()])
def test_every_white_space_parts_words(page, apart):
    assert [each["word"] for each in page("ask", "encode", f"{apart}the{apart}{apart}judge{apart}")] == ["the", "judge"]


OFFERS = {"cell.": {"cell ."}, "Judge": {"judge"}, "jugde.": {"judge ."}, "jud": {"judge"}, "Rosie": {"Rosa", "rose"}}


@pytest.mark.parametrize(("word", "offers"), OFFERS.items())
def test_nearest_words_are_offered(page, word, offers):
    found = page("ask", "suggest", word)
    assert len(found) == 3 and (offers == {found[0]} or offers < set(found))
    assert all(token >= 0 for offer in found for _, token in library_tokens(offer))


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1, max_size=60).filter(lambda text: len(text.split()) == 1))
def test_anything_gets_an_offer_that_the_model_knows(page, text):
    for offer in page("ask", "suggest", text.split()[0]):
        assert all(token >= 0 for _, token in library_tokens(offer))


def test_what_the_page_says_is_so(model):
    text = (BOOK / "type_a_sentence.md").read_text(encoding="utf8")
    law, biology = tokens_of("law"), tokens_of("biology")

    def says(*constants: float) -> tuple[str, str]:
        codes, logits = by_torch(model, law, *constants)
        return f"{loss_of(logits, law):.2f}", f"{(codes[0] > 0).sum(-1).double().mean():.0f}"

    said = {
        "58 neurons of layer 1": says(*TRAINED)[1],
        "61, at 0.89 nats instead of 0.88": ", ".join([*says(0, 0.1, 2)[::-1], says(*TRAINED)[0]]),
        "At $\\lambda=0.3$ the loss is 0.93": says(0.3, 0.1, 2)[0],
        "at 0.5 it is 1.33": says(0.5, 0.1, 2)[0],
        "at 1, with 40 neurons left, 3.77": ", ".join(says(1, 0.1, 2)[::-1]),
        "Three steps ruin it: 8.08": says(0.1, 0.1, 3)[0],
        "Four mend it: 0.92": says(0.1, 0.1, 4)[0],
        "all words alike costs 6.20": f"{torch.tensor(494.0).log():.2f}",
        "is 0.057 and 0.051": ", ".join(f"{cliff:.3f}" for cliff in codes_page.cliffs(model)),
        "90,880 numbers": f"{model.count_parameters():,}",
        "whose 494 words": str(len(tinyworld_encoding().vocabulary)),
    }
    for sentence, numbers in said.items():
        assert sentence in text
        assert all(number in sentence for number in numbers.split(", ")), (sentence, numbers)

    cells = [i for i, token in enumerate(law) if token == law[4]]
    codes, theirs = by_torch(model, law, *TRAINED)[0], by_torch(model, biology, *TRAINED)[0]
    assert len(cells) == 2 and law[:5] == biology[:5]
    torch.testing.assert_close(codes[0][:5], theirs[0][:5], atol=1e-12, rtol=0)
    first, second = (set(codes[0][i].topk(5).indices.tolist()) for i in cells)
    assert len(first & second) == 2 and "keeps two" in text


def test_the_picture_says_what_its_text_says(model):
    words, layers, loss = codes_page.codes_of(model, codes_page.SENTENCES["law"])
    on = [round((codes > 0).sum(-1).double().mean().item()) for codes in layers]
    assert on == [58, 40] and round(loss, 2) == 0.88 and len(words) == 30
    alt = re.search(r':alt: "(.*)"', (BOOK / "type_a_sentence.md").read_text(encoding="utf8"))[1]
    assert "58 of 256 neurons are on in layer 1 and 40 in layer 2" in alt


def test_sentences_are_of_this_world():
    for sentence in codes_page.SENTENCES.values():
        tokens = tinyworld_encoding().encode_ordinary(sentence)
        assert 20 < len(tokens) < 64


def test_typed_text_never_becomes_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(", SCRIPT.read_text())


PAGE = """<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<link rel="stylesheet" href="{css}"><article><div class="type-a-sentence"></div>
<img class="type-a-sentence-still" alt="a still picture" src="{png}" style="width: 100%">
{model}<script src="{script}"></script></article></html>"""
LOOK = """
const all = (what) => [...document.querySelectorAll(what)];
return {words: all('tbody th').map(e => e.textContent), nats: all('tbody td:last-child').map(e => e.textContent),
        on: all('tbody td.number').map(e => e.textContent), cards: all('.card strong').map(e => e.textContent),
        below: all('.card > :last-child').map(e => e.textContent), said: all('.said')[0].textContent,
        next: all('.next li').map(e => e.textContent), fire: all('.fire button').length,
        unknown: all('.unknown p').map(e => e.textContent), offers: all('.unknown button').map(e => e.textContent),
        chosen: all('.chosen').map(e => Number(e.dataset.token)), focus: document.activeElement.textContent,
        still: all('.type-a-sentence-still')[0].getClientRects().length, reset: all('.reset')[0].disabled,
        live: all('.type-a-sentence')[0].getClientRects().length, pictures: all('article img').length,
        unnamed: all('.type-a-sentence, input, select, textarea, canvas')
            .filter(e => !e.labels?.length && !e.ariaLabel).length}
"""
WAIT = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 30))"
INK = """
const strip = document.querySelector('tbody canvas');
const {data} = strip.getContext('2d').getImageData(0, 0, strip.width, 1), wide = strip.width / 256;
return Array.from({length: 256}, (_, i) => data[4 * i * wide + 3] > 0).filter(Boolean).length;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory, committed, check_pages):
    """Chromium at the page alone, read from the disk, and a function that waits and looks."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    links = {"css": SCRIPT.with_suffix(".css"), "png": codes_page.PICTURE, "script": SCRIPT}
    path.write_text(PAGE.format(model=committed, **{k: v.as_uri() for k, v in links.items()}), encoding="utf8")
    with check_pages.browser() as driver:
        driver.get(path.as_uri())

        def look() -> dict:
            driver.execute_async_script(WAIT)
            return driver.execute_script(LOOK)

        yield driver, look, check_pages
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert path.as_uri() in urls and not [url for url in urls if url.startswith(("http", "ws"))]


@pytest.fixture
def fresh(browser):
    driver, look, check_pages = browser
    driver.refresh()
    return driver, look, check_pages


def type_into(driver, selector: str, keys: str, clear: bool = False) -> None:
    field = driver.find_element("css selector", selector)
    if clear:
        field.clear()
    field.send_keys(keys)


def test_the_page_shows_what_the_library_computes(fresh, model):
    driver, look, _ = fresh
    seen, tokens = look(), tokens_of("law")
    codes, logits = by_torch(model, tokens, *TRAINED)
    counts = [(layer > 0).sum(-1).tolist() for layer in codes]
    losses = cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none").tolist()
    assert seen["words"] == [tinyworld_encoding().vocabulary[token] for token in tokens]
    assert seen["nats"] == ["–", *(f"{loss:.2f}" for loss in losses)]
    assert [int(n) for n in seen["on"][0::3]] == counts[0] and [int(n) for n in seen["on"][1::3]] == counts[1]
    assert seen["cards"] == ["0.88 nats a word", "58 of 256 on", "40 of 256 on"] and seen["below"][0] == "as trained"
    (at,) = seen["chosen"]
    likely = logits[at].softmax(-1).topk(5)
    words = [tinyworld_encoding().vocabulary[i] for i in likely.indices]
    assert [line[: len(word)] for line, word in zip(seen["next"], words, strict=False)] == words
    assert f"{100 * likely.values[0]:.0f}" in seen["next"][0] and seen["fire"] == 10
    assert driver.execute_script(INK) == counts[0][0]
    assert seen["still"] == 0 and seen["live"] == 1 and seen["reset"] and seen["unnamed"] == 0


def test_sliders_and_keys_move_it(fresh, model):
    from selenium.webdriver.common.keys import Keys

    driver, look, _ = fresh
    type_into(driver, "#tas-lam", Keys.ARROW_RIGHT * 8)
    seen = look()
    _, logits = by_torch(model, tokens_of("law"), 0.5, 0.1, 2)
    assert seen["cards"][0] == f"{loss_of(logits, tokens_of('law')):.2f} nats a word" == "1.33 nats a word"
    assert seen["below"][0] == "0.88 as trained, so +0.45" and not seen["reset"]
    type_into(driver, "#tas-steps", Keys.ARROW_RIGHT)
    type_into(driver, "#tas-stepSize", Keys.ARROW_LEFT * 2)
    _, logits = by_torch(model, tokens_of("law"), 0.5, 0.08, 3)
    assert look()["cards"][0] == f"{loss_of(logits, tokens_of('law')):.2f} nats a word"
    driver.find_element("css selector", ".reset").click()
    seen = look()
    assert seen["cards"][0] == "0.88 nats a word" and seen["reset"]

    driver.find_element("css selector", "tbody tr:nth-child(5) button").click()
    assert look()["chosen"] == [4]
    type_into(driver, "tbody tr:nth-child(5) button", Keys.ARROW_DOWN)
    seen = look()
    assert seen["chosen"] == [5] and seen["focus"] == "."
    texts = []
    for _ in range(2):
        type_into(driver, "tbody tr:nth-child(6) button", Keys.ARROW_RIGHT)
        texts.append(look()["said"])
    assert all(re.match(r"Layer 1, neuron \d+: 0\.\d+ at \.\. It fires at \d+ of 30", text) for text in texts)
    assert texts[0] != texts[1]
    type_into(driver, ".fire div:nth-of-type(2) li:first-child button", Keys.ENTER)
    assert look()["said"].startswith("Layer 2, neuron ")


def test_a_strip_is_pointed_at(fresh):
    from selenium.webdriver import ActionChains

    driver, look, _ = fresh
    strip = driver.find_element("css selector", "tbody tr:nth-child(3) canvas")
    left = -strip.size["width"] // 2 + 3
    ActionChains(driver).move_to_element_with_offset(strip, left, 0).perform()
    over = look()
    assert " at on. It fires at" in over["said"] and over["chosen"] != [2]
    ActionChains(driver).click().perform()
    assert look()["chosen"] == [2]


def test_one_layer_at_a_time(fresh, model):
    from selenium.webdriver.support.ui import Select

    driver, look, _ = fresh
    codes, _ = by_torch(model, tokens_of("law"), *TRAINED)
    Select(driver.find_element("css selector", "#tas-layers")).select_by_visible_text("layer 2")
    assert [int(n) for n in look()["on"][0::2]] == (codes[1] > 0).sum(-1).tolist()
    strips = "return [...document.querySelectorAll('canvas')].map(e => e.ariaLabel)"
    at, labels = 7, driver.execute_script(strips)
    assert labels[at] == f"most: neurons {', '.join(map(str, codes[1][at].topk(3).indices.tolist()))}"
    Select(driver.find_element("css selector", "#tas-order")).select_by_visible_text("number")
    look()
    first = int(codes[1][0].nonzero()[0])
    assert driver.execute_script(INK.replace(".filter(Boolean).length", ".indexOf(true)")) == first


def test_typed_words(fresh):
    driver, look, _ = fresh
    type_into(driver, "#tas-text", "the jugde. heard <img src=x onerror=document.title='broken'> Rosa", clear=True)
    seen = look()
    assert seen["words"] == ["<begin>", "the", "heard", "Rosa"]
    assert seen["unknown"][3] == "Further words left out: 1." and len(seen["unknown"]) == 4
    assert seen["unknown"][0].startswith("jugde. is no word") and seen["offers"][0] == "judge ."
    assert seen["pictures"] == 1 and driver.title != "broken"
    driver.find_element("css selector", ".unknown button").click()
    assert look()["words"] == ["<begin>", "the", "judge", ".", "heard", "Rosa"]
    type_into(driver, "#tas-text", " ", clear=True)
    seen = look()
    assert seen["words"] == ["<begin>"] and seen["cards"][0] == "– nats a word"
    driver.execute_script(
        "const t = document.querySelector('#tas-text'); t.value = '<begin> ' + 'the '.repeat(99);"
        "t.dispatchEvent(new Event('input'))"
    )
    seen = look()
    assert len(seen["words"]) == 64 and seen["unknown"] == ["Only the first 64 words are read; 36 are left out."]


def test_a_long_text_is_counted_to_its_end(fresh):
    driver, look, _ = fresh
    driver.find_element("css selector", "#tas-text").clear()
    driver.execute_cdp_cmd("Input.insertText", {"text": "the judge . " * 3334})  # as one pastes
    seen = look()
    assert len(seen["words"]) == 64 and seen["unknown"] == ["Only the first 64 words are read; 9939 are left out."]
    assert driver.execute_script("return document.querySelector('#tas-text').offsetHeight < innerHeight / 2")


def test_who_comes_back_finds_sliders_and_numbers_at_one(fresh):
    from selenium.webdriver.common.keys import Keys

    driver, look, _ = fresh
    before = look()
    for field, key in ("lam", Keys.ARROW_RIGHT), ("order", Keys.ARROW_DOWN), ("sample", Keys.ARROW_DOWN):
        type_into(driver, f"#tas-{field}", key)
    assert look() != before
    driver.execute_script("addEventListener('unload', () => 0)")  # else the browser may keep the page as it is
    driver.get("about:blank")
    driver.back()
    values = "return ['lam', 'order', 'sample'].map(name => document.querySelector(`#tas-${name}`).value)"
    assert driver.execute_script("return performance.getEntriesByType('navigation')[0].type") == "back_forward"
    assert look() == before and driver.execute_script(values) == ["0.1", "first", "law"]


def test_phone_print_and_dark(fresh):
    driver, look, check_pages = fresh
    with check_pages.screen(driver, check_pages.PHONE):
        driver.refresh()
        assert look()["words"] and driver.execute_script(check_pages.READ_WIDTH, 390) == []
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        assert len(driver.find_elements("css selector", "tbody tr:first-child canvas")) == 1
    light = driver.execute_script("return document.querySelector('canvas').toDataURL()")
    driver.execute_script("document.documentElement.dataset.theme = 'dark'")
    look()
    assert driver.execute_script("return document.querySelector('canvas').toDataURL()") != light
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    seen = look()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert seen["still"] == 1 and seen["live"] == 0
