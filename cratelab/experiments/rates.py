"""The learning rate of each model at each size, found before anything is compared (chapter 7)."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from cratelab.corpora.prepare import prepare
from cratelab.experiments.comparison import check_ladder, compare
from cratelab.experiments.tinyworld_runs import Setting, gap, new_world
from cratelab.models import MODELS
from cratelab.provenance import code_of, library_code, provenance
from cratelab.recipe import Recipe
from cratelab.storage import read_json, write_json

PEAKS = 1e-3, 3e-3, 6e-3, 1e-2, 2e-2
DEPTHS = 1, 2, 3
TOY_CONTEXT = 128
TOY_RATE = {"crate": 1e-2, "gpt2": 6e-3}  # what the sweeps found best, as rates.json says and a test holds
TUNED = {("crate", 1): 1e-2, ("crate", 2): 1e-2, ("crate", 3): 6e-3} | {("gpt2", n): 3e-3 for n in DEPTHS}


def toy_recipe(peak_rate: float, steps: int = 1500) -> Recipe:
    """How the toys that the package carries are trained: `steps` of 16 windows of 128 tokens."""
    every = max(1, steps // 15)
    return Recipe.preset("toy", steps=steps, peak_rate=peak_rate, final_rate=peak_rate / 10, checkpoint_every=every)


def sweep_toys(
    folder: str | Path,
    seeds: int = 3,
    steps: int = 1500,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """The package's toys at every rate; what is done is read.

    Returns:
        One dict a run, with ladder "toy", model, n_layers, steps, peak_rate, seed, loss, that of validation, and
        library, the code that trained.

    Raises:
        ValueError: no seeds or steps, or `folder` holds runs of other arguments.
    """
    world, found = prepare("tinyworld", context=TOY_CONTEXT), []
    for peak_rate in PEAKS:
        recipe, under = toy_recipe(peak_rate, steps), Path(folder) / f"toys-{peak_rate:g}"
        for run in compare(world, recipe, under, ("toy",), range(seeds), TOY_CONTEXT, on_run, on_step):
            facts = {"ladder": "toy", "model": run["model"], "n_layers": 2, "steps": steps, "peak_rate": peak_rate}
            library = _trained_by(under / f"{run['model']}-toy-{run['seed']}")
            found.append(facts | {"seed": run["seed"], "loss": run["validation_loss"], "library": library})
    return found


def sweep_ladder(
    folder: str | Path,
    seeds: int = 3,
    steps: int = 2000,
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """One to three layers of width 64 at every rate, as chapters 7 and 9 train them; what is done is read.

    Returns:
        One dict a run, as for `sweep_toys`, with ladder "width 64" and as loss the nats above the floor.

    Raises:
        ValueError: no seeds or steps, or `folder` holds runs of other arguments.
    """
    world, found = new_world(), []
    held_out = world.part("validation")
    for seed in check_ladder(["toy"], range(seeds))[1]:
        for n_layers in DEPTHS:
            for name in MODELS:
                for peak_rate in PEAKS:
                    setting = Setting(name, n_layers, steps, peak_rate)
                    if on_run:
                        on_run(f"{setting.name}-{seed}")
                    model, run_dir = setting.train(world, seed, folder, on_step)
                    facts = {"ladder": "width 64"} | {key: getattr(setting, key) for key in ("model", "n_layers")}
                    facts |= {"steps": steps, "peak_rate": peak_rate, "seed": seed, "loss": gap(model, held_out)}
                    found.append(facts | {"library": _trained_by(run_dir)})
    return found


def _trained_by(run_dir: Path) -> dict | None:
    return read_json(run_dir / "run.json")["provenance"].get("library")


def best_rates(runs: list[dict]) -> dict[tuple, float]:
    """Of each ladder, model, depth and number of steps the rate with the lowest mean loss over seeds."""
    keys = ("ladder", "model", "n_layers", "steps")
    losses: dict[tuple, dict[float, list[float]]] = {}
    for run in runs:
        of_rate = losses.setdefault(tuple(run[key] for key in keys), {})
        of_rate.setdefault(run["peak_rate"], []).append(run["loss"])
    return {key: min(of_rate, key=lambda rate: mean(of_rate[rate])) for key, of_rate in losses.items()}


def reproduce_rates(
    folder: str | Path,
    seeds: int = 3,
    steps: tuple[int, int] = (1500, 2000),
    on_run: Callable[[str], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> Path:
    """Make the table of rates anew; what is done is not done again.

    Args:
        folder: for the runs and the table.
        seeds: 0 up to this many.
        steps: of the toys and of the models of width 64; fewer only to try it out.
        on_run: called with the name of each run before it starts.
        on_step: as for `cratelab.training.train`.

    Returns:
        The file, to be copied to cratelab/reference.

    Raises:
        ValueError: no seeds or steps, or `folder` holds runs of other arguments.
    """
    runs = sweep_toys(folder, seeds, steps[0], on_run, on_step)
    runs += sweep_ladder(folder, seeds, steps[1], on_run, on_step)
    table = Path(folder) / "rates.json"
    library = code_of([{"library": library_code()}, *runs])
    for run in runs:
        del run["library"]  # said once, of all
    about = provenance(seeds=list(range(seeds)), steps=list(steps), library=library)
    write_json(table, {"provenance": about, "findings": runs})
    return table
