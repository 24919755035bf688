"""How a wrong answer is tried where its exercise asks for more than one, or answers more on request."""


def in_place_of(name, answer):
    """`answer` in the place of the function `name`, which is not the exercise's last."""
    answer.replaces = name
    return answer


def on_request(answer):
    """Predictions checked with `reasons=True`."""
    answer.reasons = True
    return answer


def at_first(answer):
    """Predictions checked as a reader first does, without reasons."""
    answer.reasons = False
    return answer


def hunts(right, several):
    """Wrong inputs for a bug hunt: `right()` gives one for each bug, `several` shows more bugs than one at once."""
    number = len(right())
    tried = {
        f"exposing: {number - 1} of {number} bugs exposed": lambda: right()[:-1],
        f"(?s)exposing: 0 of {number} bugs .*input 1 shows several .* and tells none": lambda: [several],
        "exposing, input 1 has 1 arguments": lambda: [several[:1]],
        "exposing should return a list of inputs, each a tuple": lambda: right()[0],
        "exposing should return a list of inputs": lambda: None,
        "are enough: choose them": lambda: 9 * right(),
        "exposing, input 2: .* is (needed; got|not what the function takes)": lambda: [several, ("many", *several[1:])],
    }
    return {message: in_place_of("exposing", answer) for message, answer in tried.items()}
