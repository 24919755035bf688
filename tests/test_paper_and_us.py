"""The numbers that the page on the paper's claims quotes are those that the chapters print or the tables hold."""

import re
from statistics import mean

import numpy as np
import pytest
from chapters import BOOK, read

from cratelab.interpret.scores import PROTOCOLS
from cratelab.provenance import read_reference

NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])")
PAGE = (BOOK / "paper_and_us.md").read_text(encoding="utf8")


def quotes(text: str, *numbers: str) -> bool:
    """Whether the text holds these numbers one after the other, with nothing but words between them."""
    found, n = NUMBER.findall(text), len(numbers)
    return any(found[i : i + n] == list(numbers) for i in range(len(found)))


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
    assert quotes(row, f"{min(tiny.values()):.0f}", f"{max(tiny.values()):.0f}", "100")
    concepts = leads("tinyworld", 2000, "concept")
    two, three = (-concepts[n, "top-and-random"] for n in (2, 3))
    assert quotes(row, f"{two:.0f}", f"{three:.0f}")
    real = [lead for e in ("token", "suffix", "concept") for lead in leads("documentation", 1500, e).values()]
    assert quotes(row, f"{min(real):.0f}", f"{max(real):.0f}")
    losses = [mean(r["validation_loss"] for r in runs("documentation", model=m, steps=1500)) for m in ("crate", "gpt2")]
    assert losses[0] - losses[1] == pytest.approx(0.5, abs=0.05)  # "half a nat"


def test_leads_by_protocol():
    tiny, row = leads("tinyworld", 2000), row_of("CRATE's neurons fire on relevant tokens")
    assert quotes(row, *(f"{tiny[n, p]:.1f}" for n in (2, 3) for p in ("random-only", "top-and-random")))


def test_steadiness_over_layers():
    ratios = []
    for keep in (2, 3):
        for p in PROTOCOLS:
            c, g = (
                mean(np.var(layers(run, p)[:keep]) for run in runs("tinyworld", model=m, n_layers=3, steps=2000))
                for m in ("crate", "gpt2")
            )
            ratios.append(g / c)
    assert quotes(row_of("Interpretability is steady"), f"{min(ratios):.0f}", f"{max(ratios):.0f}")


def test_losses():
    gaps = [
        [mean(run["gap"] for run in runs("tinyworld", model=m, n_layers=n, steps=2000)) for n in (1, 2, 3)]
        for m in ("crate", "gpt2")
    ]
    assert quotes(row_of("Performance is comparable"), *(f"{gap:.3f}" for each in gaps for gap in each))


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


def test_numbers_are_quoted_in_order():
    assert quotes("by 2 to 6 points, GPT-2 by 1,024", "2", "6", "1,024")
    assert not quotes("by 2 to 6 points", "6", "2") and not quotes("by 12 to 60 points", "2", "6")
    assert not quotes("by 2 to 5 or 6 points", "2", "6")


def test_every_claim_has_a_verdict():
    tables = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 5]
    assert len(tables) > 5 and all(cell.strip() for line in tables for cell in line[1:5])
