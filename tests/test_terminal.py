import io
import os
import sys
import warnings

import pytest
from tqdm import tqdm

from cratelab.terminal import Output, plain_warnings, printable, say, unfailing_output


class Failing(io.StringIO):
    """A stream that takes one line and then fails."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if "\n" in self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed")]
)
def test_a_stream_that_fails_costs_nothing_and_is_named(error, monkeypatch):
    stream = Failing(error)
    monkeypatch.setattr(sys, "stdout", stream)
    with unfailing_output() as output:
        for i in range(3):
            print(i)
    assert stream.getvalue() == "0\n" and output.error is error and sys.stdout is stream


@pytest.mark.parametrize("closed", [None, io.StringIO()], ids=["by the shell", "by the program"])
def test_progress_goes_on_where_both_streams_are_closed(closed, monkeypatch):
    if closed:
        closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", closed)
    with unfailing_output() as output:
        assert sum(tqdm([1, 2], disable=None)) == 3 == sum(tqdm([1, 2], disable=False))
        print("seen by nobody", file=sys.stderr)
        say("nor this")
    assert output.error is None and sys.stdout is closed and sys.stderr is closed


@pytest.mark.parametrize(
    ("encoding", "seen"), [("ascii", r"1.0 +- 0.2 * \xe9"), ("latin-1", "1.0 ± 0.2 é"), ("utf-8", "1.0 ± 0.2 • é")]
)
def test_what_a_terminal_cannot_show_is_written_plainly_or_escaped(encoding, seen):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    print("1.0 ± 0.2 • é" if encoding != "latin-1" else "1.0 ± 0.2 é", file=Output(stream))
    assert stream.buffer.getvalue().decode(encoding) == seen + "\n"


def test_a_lone_surrogate_is_escaped_and_not_fatal():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    print("a\udc80", file=Output(stream))
    assert stream.buffer.getvalue() == b"a\\udc80\n"


def test_an_output_is_asked_like_the_stream_it_writes_to():
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    assert Output(stream).encoding == "latin-1" and not Output(stream).isatty()


def test_descriptors_of_closed_streams_are_taken_before_a_file_can_be_opened_there(tmp_path):
    kept = os.dup(0)
    try:
        os.close(0)
        with unfailing_output(), (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_control_characters_are_escaped_and_all_other_text_is_as_it_was(capsys):
    assert printable("a\x1b[31mb\r\x9b\u202ec\udc80\x00") == r"a\x1b[31mb\r\x9b\u202ec\udc80\x00"
    for text in "two\nlines\tand tabs", "Ünïcödé 漢字 🎉 ± \u3000", "":
        assert printable(text) == text
    say("\x1b]0;title\x07")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\n"


def test_a_warning_is_a_line_for_people():
    usual = warnings.formatwarning
    with plain_warnings():
        shown = warnings.formatwarning("a file named \x1b[31m is left out", UserWarning, "prepare.py", 3)
    assert shown == "cratelab: a file named \\x1b[31m is left out\n"
    assert warnings.formatwarning is usual
