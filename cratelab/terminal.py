"""The terminal: output whose failure costs no work, and text that gives a terminal no commands."""

import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

# for terminals that do not know them
PLAIN = str.maketrans({"±": "+-", "×": "x", "•": "*", "…": "...", "→": "->", "ε": "eps"})


class Output:
    """A standard stream that never raises: it escapes what it cannot encode, and falls silent where nobody takes it.

    Attributes:
        error: why it fell silent, if it did: a closed pipe, a full disk.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | ValueError | None = None

    def __getattr__(self, name: str):  # encoding, isatty and whatever else is asked of a stream
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, _encodable(text, getattr(self._stream, "encoding", None) or "utf8"))
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act, *arguments) -> None:
        if self.error:
            return
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.error = error
            # else Python fails at its end to write what is left in the buffer
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)


def is_main_process() -> bool:
    """Whether it is this process that speaks and writes, of those that torchrun or `accelerate launch` has started."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def unfailing_output() -> Iterator[Output]:
    """Inside the block what goes to standard output and error, progress and warnings included, goes through `Output`.

    Of several processes that do the same work, the main one alone is heard.

    Yields:
        Standard output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file takes the place of a stream that is closed
        pass
    os.close(descriptor)
    with open(os.devnull, "w") as nowhere:
        output, errors = (
            Output(stream if is_main_process() and _is_open(stream) else nowhere) for stream in (sys.stdout, sys.stderr)
        )
        with redirect_stdout(output), redirect_stderr(errors):
            yield output


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside the block warnings are a line for people, without a place in the source."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **line: f"cratelab: {printable(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _is_open(stream: TextIO | None) -> bool:
    """Python has no stream where the shell has closed it."""
    return stream is not None and not getattr(stream, "closed", False)


def printable(text: str) -> str:
    """`text` with its control characters escaped, but for line ends and tabs: some move the cursor, some hide text."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character)[0] == "C" and character not in "\n\t" else character
        for character in text
    )


def say(text: str = "") -> None:
    """Print text that may come from a corpus, a model or a file's name."""
    print(printable(text))
