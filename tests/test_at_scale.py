"""The counts on the page "At scale" are those of `cratelab.budget.estimate`."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from many_processes import launch
from test_paper_and_us import quotes

import cratelab as cl
from cratelab import budget
from cratelab.budget import estimate
from cratelab.models import new_model
from cratelab.recipe import Recipe

PAGE = (Path(__file__).parents[1] / "book" / "at_scale.md").read_text(encoding="utf8")
TABLE = re.findall(r"^\| (?:1L|2L|3L|S|B) \| [CG].*$", PAGE, re.MULTILINE)
SIZES = re.findall(r"^\| (1L|2L|3L|S|B) \| (\d.*) \|$", PAGE, re.MULTILINE)


def rows() -> Iterator[str]:
    """The rows of the page's table, as they should be."""
    for size in ("1L", "2L", "3L", "S", "B"):
        for name, model in ("CRATE", cl.Crate), ("GPT-2", cl.Gpt2):
            found = estimate(model, model.config_class.preset(size), Recipe.preset(size))
            days = found.tokens * found.flops_per_token / 1e12 / 86400
            yield (
                f"| {size} | {name} | {found.parameters:,} | {found.state_bytes / 2**30:.2f} | "
                f"{found.activation_bytes / 2**30:.2f} | {found.flops_per_token / 1e6:,.0f} | {days:,.0f} |"
            )


@pytest.fixture(scope="module")
def counted() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "measure_matmul_rate", lambda device: 1e12)
        return list(rows())


def test_the_table_has_the_counts_of_estimate(counted):
    assert counted == TABLE


def test_the_table_of_sizes_is_counted_by_hand_and_agrees_with_the_paper_but_for_s():
    assert [size for size, _ in SIZES] == ["1L", "2L", "3L", "S", "B"]
    for size, cells in SIZES:
        numbers = (float(re.sub("[,M]", "", cell)) for cell in cells.split(" | "))
        n_layers, width, crate, paper_crate, gpt2, paper_gpt2, ratio = numbers
        assert crate == 50_304 * width + n_layers * (6 * width**2 + 5 * width) + 2 * width
        assert gpt2 == 50_304 * width + n_layers * (12 * width**2 + 2 * width) + width
        assert ratio == round(crate / gpt2, 2)
        assert (abs(crate / 1e6 - paper_crate) < 0.06) == (size != "S") and abs(gpt2 / 1e6 - paper_gpt2) < 0.06
        preset = cl.CrateConfig.preset(size)
        assert (preset.n_layers, preset.width) == (n_layers, width)


def test_the_plan_of_the_long_run_follows_from_the_table(counted):
    days = {row.split(" | ")[1]: int(row.split(" | ")[-1].strip(" |").replace(",", "")) for row in counted[-2:]}
    plan = PAGE[PAGE.index("## The paper's 12-layer run") :]
    rates = 100, 200, 400
    assert quotes(plan, f"{days['CRATE']:,}", *map(str, rates), *(str(round(days["CRATE"] / r)) for r in rates))
    assert quotes(plan, f"{Recipe().steps * Recipe().batch * 1024:,}")


def test_the_script_for_several_gpus_runs_in_two_processes_and_again(tmp_path):
    run = tmp_path / "run"
    new_model("crate", "toy", 2048, seed=0).save(run / "model")
    (script,) = re.findall(r"```python\n(import cratelab as cl\n.*?evaluate_sae.*?)```", PAGE, re.DOTALL)
    corpus = 'prepare("tinyworld", characters=200_000)'
    small = '"runs/crate-B-pile-0", prepare("pile"), 50_000_000', f'"{run}", {corpus}, 3000'
    for usual, ours in small, ("100_000", "3000"), ("batch=4096", "batch=64, buffer=2000, validation_tokens=1000"):
        assert script.count(usual) == 1
        script = script.replace(usual, ours)
    done = [launch(2, script) for _ in range(2)]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr[-3000:]
    assert done[0].stdout == done[1].stdout and re.fullmatch(r"0 \d+ -?[\d.]+\n1 \d+ -?[\d.]+\n", done[0].stdout)
