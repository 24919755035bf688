"""The notation of TinyWorld's sentences.

A template is a line: an integer weight, then words and marks.

| in a template | means |
|---|---|
| `river` | this word |
| `bat#animal` | this word, in the sense named |
| `$animal` | a word of the domain's list `animal`; which ones are likely depends on the topic |
| `$girl=hero` | a word of the list `girl`, all alike; the document remembers it as the fact `hero` |
| `@hero` | the fact `hero`, as last told |
| `/subject` | no word: names the role of the words since the last such mark |
"""

from dataclasses import dataclass

_ENCLOSING = {'"': ("quotation", '"'), "(": ("brackets", ")"), "[": ("citation", "]"), "#": ("comment", "\n")}
PARTS = ("title", "opening", "body", "closing")


@dataclass
class Domain:
    """One kind of text.

    Attributes:
        topics: names of its two topics; the first prefers the words at the front of each list, the second the last.
        lists: words by list, separated by spaces.
        title: templates, a line each, as are the other parts.
        opening: told after the title; its facts are known from then on.
        body: sentences, any number.
        closing: the last words.
    """

    topics: tuple[str, str]
    lists: dict[str, str]
    title: str
    opening: str
    body: str
    closing: str


@dataclass
class Item:
    """One token of a template: a `word`, or one of the list `choices`, or the fact `recalls`; and its labels."""

    word: str = ""
    choices: str = ""
    remembers: str = ""
    recalls: str = ""
    sense: str = ""
    role: str = ""
    contexts: tuple[str, ...] = ()

    @property
    def symbol(self) -> tuple[str, str, str, str]:
        """All that shows of it in a text, where labels do not."""
        return self.word, self.choices, self.remembers, self.recalls


@dataclass
class Template:
    """A sentence to fill in, drawn among its like in proportion to its weight."""

    weight: int
    items: list[Item]


def parse(line: str) -> Template:
    """The template that a line such as `2 the $animal /subject ran /verb .` describes."""
    weight, *marks = line.split()
    items, unlabelled, enclosing = [], 0, []
    for mark in marks:
        if mark[0] == "/":
            for item in items[unlabelled:]:
                item.role = mark[1:]
            unlabelled = len(items)
            continue
        item = _item(mark)
        closes = bool(enclosing) and item.word == enclosing[-1][1]
        if closes:
            enclosing.pop()
        item.contexts = tuple(name for name, _ in enclosing)
        if item.word in _ENCLOSING and not closes:
            enclosing.append(_ENCLOSING[item.word])
        items.append(item)
    return Template(int(weight), items)


def _item(mark: str) -> Item:
    if mark[0] == "$":
        choices, _, remembers = mark[1:].partition("=")
        return Item(choices=choices, remembers=remembers)
    if mark[0] == "@":
        return Item(recalls=mark[1:])
    if mark == "#":
        return Item(mark)
    word, _, sense = mark.replace("\\n", "\n").partition("#")
    return Item(word, sense=sense)
