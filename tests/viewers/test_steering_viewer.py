import copy
import json
from dataclasses import replace

import pytest
import torch
from test_neuron_viewer import HOSTILE, SHOWN, Page, Words
from test_steering import shaken, some_tokens
from test_training import VOCAB

import cratelab as cl
from cratelab.corpora.tokenizers import WordEncoding
from cratelab.steering import frontier, steer
from cratelab.viewers.steering import steering_viewer

STRENGTHS = 0.5, 2.0


@pytest.fixture(scope="module")
def pushed():
    """A model, and the arguments for two of its neurons."""
    model, prompts = shaken(cl.Gpt2), some_tokens(2, 5)
    neurons, maxima = torch.tensor([3, 40]), torch.tensor([1.5, 3.0])
    targets = torch.zeros(2, VOCAB, dtype=torch.bool)
    targets[0, :4], targets[1, 5:7] = True, True
    found = frontier(model, prompts, 1, neurons, maxima, targets, ~targets, STRENGTHS)
    return model, (prompts, 1, neurons, maxima, targets, found, ["first", "second"])


def draw(pushed, tokenizer=None, **options) -> Page:
    model, given = pushed
    words = tokenizer or WordEncoding([f"w{i}" for i in range(VOCAB)])
    return Page(steering_viewer(model, words, *given, **{"strengths": STRENGTHS, "n_new": 4} | options).html)


def test_what_is_shown_is_what_steer_gives(pushed):
    model, (prompts, layer, neurons, maxima, targets, found, _) = pushed
    data = draw(pushed, n_tokens=6).data
    assert data["strengths"] == ["as it is", "set to 0.5 × its maximum", "set to 2 × its maximum"]
    for j, neuron in enumerate(neurons):
        for i, strength in enumerate((None, *STRENGTHS)):
            step = data["neurons"][j]["steps"][i]
            edits = {} if strength is None else dict(layer=layer, neuron=neuron, value=strength * maxima[j])
            with steer(model, **edits), torch.no_grad():
                logits = model(prompts)[:, -1]
                texts = model.generate(prompts, 4, temperature=0)[:, 5:]
            for p in range(2):
                tokens, percent, marks = step["next"][p]
                tokens = [int(data["tokens"][place][1:]) for place in tokens]
                chances = logits[p].softmax(-1)
                assert percent == pytest.approx((100 * chances[tokens]).tolist(), abs=0.51)
                assert set(tokens) == set(chances.topk(6).indices.tolist())
                mass = 100 * float(chances[targets[j]].sum())
                assert float(step["mass"][p]) == pytest.approx(mass, rel=0.06)
                assert marks == targets[j, tokens].int().tolist()
                assert [int(data["tokens"][place][1:]) for place in step["text"][p]] == texts[p].tolist()
            assert float(step["lift"]) == pytest.approx(float(found.lift[i, j]), abs=0.006)
            assert float(step["off"]) == pytest.approx(float(found.off_target[i, j]), rel=0.06)


def test_without_a_script_there_is_a_table_of_every_neuron_and_strength(pushed):
    page = draw(pushed)
    assert page.text("caption") == ["layer 1, neuron 3: first", "layer 1, neuron 40: second"]
    assert page.text("th").count("set to 2 × its maximum") == 2
    hidden = {attributes.get("class") for _, attributes in page.elements if "hidden" in attributes}
    assert hidden == {"bar", "next", "facts"}  # what needs the script


def test_hostile_tokens_and_names_are_shown_and_do_nothing(pushed):
    evil = "</script><img src=x onerror=alert(1)>\u202e"
    model, given = pushed
    words = Words((HOSTILE * VOCAB)[:VOCAB])
    page = Page(steering_viewer(model, words, *given[:-1], [evil, evil], STRENGTHS, title=evil, n_new=4).html)
    assert set(page.data["tokens"]) <= set(SHOWN) and len(set(page.data["tokens"])) > 10
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(name.startswith("on") or name in ("src", "href") for _, a in page.elements for name in a)
    assert any("onerror" in text for text in page.text("caption"))
    json.dumps(page.data)


def test_every_control_has_a_name(pushed):
    page = draw(pushed)
    controls = [attributes for tag, attributes in page.elements if tag in ("select", "input")]
    assert len(controls) == 3 == page.elements.count(("label", {})) + page.elements.count(("label", {"class": "slide"}))
    assert controls[2] == {"type": "range", "min": "0", "max": "2", "value": "0"}


def test_what_does_not_fit_is_refused(pushed):
    model, given = pushed
    words = WordEncoding([f"w{i}" for i in range(VOCAB)])
    with pytest.raises(ValueError, match="2 neurons need as many"):
        steering_viewer(model, words, *given[:-1], ["one"], STRENGTHS)
    for targets in given[4][:, 1:], given[4].int():  # integers would pick tokens instead
        with pytest.raises(ValueError, match=r"targets must be torch.bool, and mark all 19 tokens; got torch.* of 1"):
            steering_viewer(model, words, *given[:4], targets, *given[5:], STRENGTHS)
    with pytest.raises(ValueError, match="3 strengths were given, and 2 measured"):
        steering_viewer(model, words, *given, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="colour must be #rrggbb"):
        draw(pushed, colour="red")


def test_a_name_that_is_no_text_is_saved(pushed, tmp_path):
    model, given = pushed
    words, evil = WordEncoding([f"w{i}" for i in range(VOCAB)]), "\ud800 </script> \u2028 \x1b[31m"
    view = steering_viewer(model, words, *given[:-1], [evil, evil], STRENGTHS, title=evil, n_new=1)
    view.save(tmp_path / "page.html")
    saved = (tmp_path / "page.html").read_text(encoding="utf8")
    assert all(character.isprintable() or character == "\n" for character in saved)
    shown = "layer 1, neuron 3: \\ud800 </script> \\u2028 \\u001b[31m"
    assert Page(saved).data["neurons"][0]["name"] == shown and shown in Page(saved).text("caption")


def test_measurements_that_are_no_number_are_shown_as_such(pushed):
    model, given = pushed
    *most, found, names = given
    nothing = replace(found, lift=found.lift * torch.nan, off_target=found.off_target * torch.nan)
    words = WordEncoding([f"w{i}" for i in range(VOCAB)])
    page = Page(steering_viewer(model, words, *most, nothing, names, STRENGTHS, n_new=1).html)
    steps = page.data["neurons"][0]["steps"]
    assert {step["lift"] for step in steps} == {"+nan"} and {step["off"] for step in steps} == {"nan"}


def test_tokens_that_only_pad_the_vocabulary_are_never_among_the_most_probable(pushed):
    model, given = pushed
    words = WordEncoding([f"w{i}" for i in range(4)])  # 5 with the end of text, of 19
    page = Page(steering_viewer(model, words, *given, STRENGTHS, n_tokens=VOCAB, n_new=3).html)
    for neuron in page.data["neurons"]:
        for step in neuron["steps"]:
            for tokens, _, _ in step["next"]:
                assert len(tokens) == 5 and not any(page.data["tokens"][place].startswith("[") for place in tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions_are_shown_alike(pushed, dtype):
    model, (prompts, layer, neurons, maxima, targets, found, names) = pushed
    words = WordEncoding([f"w{i}" for i in range(VOCAB)])
    other, shown = copy.deepcopy(model).to(dtype), []
    for each, strongest in (model, maxima), (other, maxima.to(dtype)):
        arguments = prompts, layer, neurons, strongest, targets, found, names, STRENGTHS
        shown.append(Page(steering_viewer(each, words, *arguments, n_tokens=VOCAB, n_new=1).html).data["neurons"])
    for one, two in zip(*shown, strict=True):
        for step, same in zip(one["steps"], two["steps"], strict=True):
            assert float(step["mass"][0]) == pytest.approx(float(same["mass"][0]), abs=8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(pushed, value):
    model, (prompts, layer, neurons, maxima, *rest) = pushed
    words = WordEncoding([f"w{i}" for i in range(VOCAB)])
    with pytest.raises(ValueError, match="maxima and strengths must be finite"):
        steering_viewer(model, words, prompts, layer, neurons, maxima * value, *rest, STRENGTHS)
    with pytest.raises(ValueError, match="maxima and strengths must be finite"):
        steering_viewer(model, words, prompts, layer, neurons, maxima, *rest, (1.0, value))
    hook = model.norm.register_forward_hook(lambda module, inputs, output: output * value)
    with pytest.raises(ValueError, match=r"logits are NaN or infinite|is not finite"):
        steering_viewer(model, words, prompts, layer, neurons, maxima, *rest, STRENGTHS)
    hook.remove()
    for options in {"n_tokens": 0}, {"n_new": -1}:
        with pytest.raises(ValueError, match="n_tokens >= 1, n_new >= 0"):
            draw(pushed, **options)
