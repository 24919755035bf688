import pytest

from cratelab.interpret.asking.prompts import escape, explanation_prompt, simulation_prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb", r"a\tb"),
        ("\r\n", r"\r\n"),
        ("\ud800", r"\ud800"),
        ("\u2028\x00", r"\u2028\x00"),
        ("\\n", r"\\n"),
        ("<|endoftext|>", r"<|endoftext|\>"),
        ("<a><b>", r"<a\><b\>"),
        ("a> <<b c>>", r"a> <<b c\>>"),
        pytest.param("<" * 300_000, "<" * 300_000, id="in linear time"),
        ("a > b -> 漢é ", "a > b -> 漢é "),
    ],
)
def test_escapes(text, expected):
    assert escape(text) == expected


def test_the_simulation_prompt_leaves_no_activation_to_read_off():
    *pieces, last = simulation_prompt("cats", ["a", "b", "c"])
    assert pieces[0].endswith("Neuron 2: cats\na\t") and pieces[1] == "unknown\nb\t" and last == "unknown\nc\t"
    assert "10" not in pieces[0] and " storm\t9\n" in pieces[0]


def test_active_rows_are_repeated_below_a_fifth():
    assert "Only where" not in explanation_prompt([[("x", 1)] + [("y", 0)] * 4])
    assert "Only where it is active\nx\t1\nIn one" in explanation_prompt([[("x", 1)] + [("y", 0)] * 5])
