"""CRATE and GPT-2 on a GPU, for book/reference: losses, loss curves, rates and sparsity layer by layer.

    python -c "from cratelab.corpora.prepare import prepare as p; p('FOLDER+…', 'gpt2', 110_000_000, cache='packed')"
    python benchmarks/gpu_reference.py packed/NAME OUT                       1L, 2L, 3L under three seeds
    python benchmarks/gpu_reference.py packed/NAME OUT --presets S --seeds 1
    python benchmarks/gpu_reference.py --toy OUT                             a minute on any machine

The first line packs text into tokens, 50 MB for 25 million, where the text is; the folder is then carried to the GPU.
Runs go on where they stopped when the same line is started again with the same OUT.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import cratelab as cl
from cratelab.comparison import compare, summarise
from cratelab.corpora.prepare import prepare
from cratelab.layerwise import layer_statistics
from cratelab.record import provenance
from cratelab.storage import write_json
from cratelab.training import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="PACKED OUT")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--presets", nargs="+", default=["1L", "2L", "3L"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=25_000_000, help="to read, of each run")
    parser.add_argument("--batch", type=int, default=16, help="windows of 1,024 tokens a step")
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    options = parser.parse_args()
    out = Path(options.paths[-1])
    if options.toy:
        corpus, presets, seeds, context = prepare("tinyworld", characters=200_000, context=96), ["toy"], 2, 96
        recipe = Recipe.preset("toy", steps=20, validate_every=10)
    else:
        corpus, presets, seeds, context = prepare(options.paths[0]), options.presets, options.seeds, 1024
        steps = options.tokens // (options.batch * context)
        recipe = Recipe(
            steps=steps,
            batch=options.batch,
            peak_rate=options.peak_rate,
            final_rate=options.peak_rate / 10,
            warmup=steps // 20,
            validate_every=max(1, steps // 20),
            validation_windows=128,
            checkpoint_every=max(1, steps // 4),
        )
    start = time.perf_counter()
    runs = compare(corpus, recipe, out / "runs", presets, range(seeds), context, print, report)
    device = cl.best_device()
    windows = torch.as_tensor(corpus.validation.validation_windows(context, min(64, len(corpus.validation) // context)))
    for run in runs:
        folder = out / "runs" / f"{run['model']}-{run['preset']}-{run['seed']}"
        model = cl.load(folder / "model").to(device)
        statistics = layer_statistics(model, windows.to(device).split(8), lasso_steps=200 * (run["model"] == "crate"))
        run["layers"] = {name: values.tolist() for name, values in statistics.items()}
        run["provenance"] = json.loads((folder / "run.json").read_text())["provenance"]
    about = provenance(seconds=round(time.perf_counter() - start), recipe=vars(recipe), corpus=corpus.training.facts())
    name = "gpu_" + "_".join(presets)
    write_json(out / f"{name}.json", {"provenance": about, "findings": runs, "table": summarise(runs)})
    for row in summarise(runs):
        print(row)


def report(row: dict) -> None:
    if "validation_loss" in row:
        print(f"  step {row['step']}: validation {row['validation_loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
