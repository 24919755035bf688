"""The numbers that the page on the paper's claims quotes are those that the chapters print or the tables hold."""

from statistics import mean

import numpy as np
import pytest
from chapters import BOOK, read

from cratelab.interpret.scores import PROTOCOLS
from cratelab.provenance import read_reference

PAGE = (BOOK / "paper_and_us.md").read_text(encoding="utf8")


def row_of(claim: str) -> str:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {claim}"))
    return line


def printed(slug: str) -> str:
    """What the cells of a chapter print."""
    outputs = (output for cell in read(slug).cells for output in cell.get("outputs", []))
    return "\n".join(output["text"] for output in outputs if output.get("name") == "stdout")


def runs(part: str, **wanted) -> list[dict]:
    """By seed; `lam` and `top_k` as usual unless wanted otherwise."""
    wanted = {"lam": 0.1, "top_k": None} | wanted
    found = read_reference("crate_against_gpt2")["findings"][part]
    chosen = [run for run in found if all(run.get(key, value) == value for key, value in wanted.items())]
    return sorted(chosen, key=lambda run: run["seed"])


def layers(run: dict, protocol: str, explainer: str = "token") -> list[float]:
    wanted = protocol, explainer, True
    rows = run["trained"]["rows"]
    return next(row["layers"] for row in rows if (row["protocol"], row["explainer"], row["strict"]) == wanted)


def leads(part: str, steps: int, explainer: str = "token") -> dict:
    return {
        (n, p): np.mean(
            [
                mean(layers(c, p, explainer)) - mean(layers(g, p, explainer))
                for c, g in zip(
                    runs(part, model="crate", n_layers=n, steps=steps),
                    runs(part, model="gpt2", n_layers=n, steps=steps),
                    strict=True,
                )
            ]
        )
        for n in (1, 2, 3)
        for p in PROTOCOLS
    }


def test_leads_in_score():
    row = row_of("Neurons of CRATE score higher")
    tiny = leads("tinyworld", 2000)
    assert f"by {min(tiny.values()):.0f} to {max(tiny.values()):.0f} points of 100" in row
    concepts = leads("tinyworld", 2000, "concept")
    two, three = (-concepts[n, "top-and-random"] for n in (2, 3))
    assert f"GPT-2 leads by {two:.0f} and {three:.0f} points at two and three layers" in row
    real = [lead for e in ("token", "suffix", "concept") for lead in leads("documentation", 1500, e).values()]
    assert f"by {min(real):.0f} to {max(real):.0f} points, while half a nat behind" in row
    losses = [mean(r["validation_loss"] for r in runs("documentation", model=m, steps=1500)) for m in ("crate", "gpt2")]
    assert losses[0] - losses[1] == pytest.approx(0.5, abs=0.05)


def test_leads_by_protocol():
    tiny, row = leads("tinyworld", 2000), row_of("CRATE's neurons fire on relevant tokens")
    pairs = [f"{tiny[n, 'random-only']:.1f} against {tiny[n, 'top-and-random']:.1f}" for n in (2, 3)]
    assert f"({', '.join(pairs)})" in row


def test_steadiness_over_layers():
    ratios = []
    for keep in (2, 3):
        for p in PROTOCOLS:
            c, g = (
                mean(np.var(layers(run, p)[:keep]) for run in runs("tinyworld", model=m, n_layers=3, steps=2000))
                for m in ("crate", "gpt2")
            )
            ratios.append(g / c)
    assert f"is {min(ratios):.0f} to {max(ratios):.0f} times smaller" in row_of("Interpretability is steady")


def test_losses():
    gaps = [
        [mean(run["gap"] for run in runs("tinyworld", model=m, n_layers=n, steps=2000)) for n in (1, 2, 3)]
        for m in ("crate", "gpt2")
    ]
    crate, gpt2 = (", ".join(f"{gap:.3f}" for gap in each) for each in gaps)
    assert f"{crate} nats above TinyWorld's floor against {gpt2}" in row_of("Performance is comparable")


@pytest.mark.parametrize(
    ("claim", "slug", "quoted"),
    [
        ("Neurons of CRATE score higher", "09_crate_against_gpt2", ["+0.6 ± 3.1", "+3.2 ± 2.7", "-1.0 ± 1.7"]),
        ("Interpretability is steady", "09_crate_against_gpt2", ["3.2", "6.5", "1.0", "2.7"]),
        ("Steering costs no fidelity", "11_steering", ["1.96 [1.61, 2.38]", "1.06 [0.95, 1.19]"]),
        ("Built-in sparse coding", "10_sparse_auto_encoders", ["0.006", "0.08"]),
    ],
)
def test_numbers_of_other_chapters_are_printed_there(claim, slug, quoted):
    row, outputs = row_of(claim), printed(slug)
    assert all(number in row and number in outputs for number in quoted)


def test_every_claim_has_a_verdict():
    tables = [line for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 5]
    verdicts = [line.split("|")[4].strip() for line in tables if not line.startswith("| claim")]
    assert len(verdicts) == 10
    assert all(any(word in verdict for word in ("holds", "not")) for verdict in verdicts)
