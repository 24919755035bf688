"""CRATE and GPT-2 on a GPU, for book/reference: losses, loss curves, rates and sparsity layer by layer.

    python -c "from cratelab.corpora.prepare import prepare as p; p('TEXTS', 'gpt2', 110_000_000, cache='packed')"
    python benchmarks/gpu_reference.py packed/NAME OUT                       1L, 2L, 3L under three seeds
    python benchmarks/gpu_reference.py packed/NAME OUT --presets S --seeds 0
    python benchmarks/gpu_reference.py packed/NAME OUT --models crate --peak-rate 1e-2 --context 512 --batch 32
    python benchmarks/gpu_reference.py --toy OUT                             a minute on any machine

The first line packs text into tokens, 50 MB for 25 million, where the text is; the folder is then carried to the GPU.
OUT/gpu_PRESETS.json has each run as soon as it is done, and before that its losses so far. The same line goes on where
it was cut off; the checkpoints for that, and the models, lie in OUT.work.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from results import Results

import cratelab as cl
from cratelab.corpora.prepare import prepare
from cratelab.experiments.comparison import compare, loss_table
from cratelab.layerwise import layer_statistics
from cratelab.models import MODELS
from cratelab.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="PACKED OUT")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--presets", nargs="+", default=["1L", "2L", "3L"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=25_000_000, help="to read, of each run")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    options = parser.parse_args()
    out = Path(options.paths[-1])
    if options.toy:
        corpus, presets, seeds, context = prepare("tinyworld", characters=200_000, context=96), ["toy"], [0, 1], 96
        recipe = Recipe.preset("toy", steps=20, validate_every=10)
    else:
        corpus, presets, seeds, context = prepare(options.paths[0]), options.presets, options.seeds, options.context
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
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / f"gpu_{'_'.join(presets)}.json", recipe=vars(recipe), corpus=corpus.training.facts())
    windows = torch.as_tensor(corpus.validation.validation_windows(context, min(64, len(corpus.validation) // context)))
    running = []

    def begin(name: str) -> None:
        print(name, flush=True)
        running[:] = [name, []]

    def report(row: dict) -> None:
        if "validation_loss" in row:
            name, curve = running
            curve.append((row["tokens"], row["validation_loss"]))
            if "layers" not in results.rows.get(name, {}):
                results.add(name, {"unfinished curve": curve})
            print(f"  step {row['step']}: validation {row['validation_loss']:.3f}", flush=True)

    for seed in seeds:
        for preset in presets:
            names = [f"{model}-{preset}-{seed}" for model in options.models]
            if all("layers" in results.rows.get(name, {}) for name in names):
                continue
            runs = Path(f"{out}.work") / "runs"
            trained = compare(corpus, recipe, runs, [preset], [seed], context, begin, report, options.models)
            for name, run in zip(names, trained, strict=True):
                model = cl.load(runs / name / "model").to(cl.best_device())
                lasso_steps = 200 * isinstance(model, cl.Crate)
                statistics = layer_statistics(model, windows.to(cl.best_device()).split(8), lasso_steps=lasso_steps)
                run["layers"] = {name: values.tolist() for name, values in statistics.items()}
                run["provenance"] = json.loads((runs / name / "run.json").read_text())["provenance"]
                results.add(name, run)
    for row in loss_table(list(results.rows.values())):
        print(row)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
