"""Blocks, models and records of all neurons on a GPU, a number at a time: python benchmarks/gpu_speed.py OUT [--toy]

What takes seconds comes first, what torch.compile takes a minute for comes last. OUT/speed.json has each row as soon
as it is known; the same line goes on where a run was cut off. The rows are those of bench_training and bench_interpret.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from bench_interpret import MODELS, collecting
from bench_training import Bench, peak_bytes
from results import Results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    toy, bench = options.toy, Bench(options.toy, compiled=True)
    results = Results(options.out / "speed.json", toy=toy, dtype=str(bench.dtype))

    def training(kind: str, preset: str, compiled: bool) -> dict:
        torch._dynamo.reset()
        with bench.device:
            return {"block": bench.block, "model": bench.model}[kind](preset, compiled)

    def records(name: str) -> dict:
        preset, n_tokens, sizes = ("toy", 2_000, dict(vocab_size=256, context=64)) if toy else ("S", 200_000, {})
        rows = []

        def collect() -> None:
            rows.append(collecting(name, preset, bench.device, n_tokens, 16, 1 if toy else 2, **sizes))

        if bench.device.type != "cuda":
            collect()
            return rows[0]
        return {"peak bytes, model and text included": peak_bytes(collect, bench.device)} | rows[0]

    presets = list(bench.block_sizes)
    plan = {
        f"{kind} {preset}": lambda kind=kind, preset=preset: training(kind, preset, False)
        for kind in ("block", "model")
        for preset in presets
    }
    plan |= {f"records {name}": lambda name=name: records(name) for name in MODELS}
    plan |= {
        f"{kind} {preset} compiled": lambda kind=kind, preset=preset: training(kind, preset, True)
        for preset in reversed(presets)
        for kind in ("model", "block")
    }
    for name, measure in plan.items():
        if name in results.rows:
            print(f"{name}: known", flush=True)
            continue
        print(f"{name} …", flush=True)
        start = time.perf_counter()
        row = measure()
        results.add(name, row | {"took": time.perf_counter() - start})
        print(f"{name}: {row}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
