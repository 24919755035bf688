"""Speed and memory of training sparse auto-encoders.

| what | peer or limit |
|---|---|
| tokens a second of a step | five products of the sizes that a step cannot do without |
| tokens a second of all layers together, evaluations left out | the forward pass of the model alone, on the same text |
| what the model's activations cost within a training | the whole of it |
| memory beside the model | the same at two lengths of training |

    python benchmarks/bench_sae.py            a size that suits the device
    python benchmarks/bench_sae.py --toy      seconds, to see that it runs

On a CPU times are those of the process, so that other work on the machine counts less.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from bench_interpret import clock, new_model, peak_of_process, seconds, text_of

import cratelab as cl
from cratelab.reading import watch_neurons
from cratelab.sae import Sae, SaeConfig, SaeRecipe, train_saes
from cratelab.sae.learner import Learner

KINDS = "relu", "batchtopk"


def steps(d_in: int, expansion: int, batch: int, device: torch.device, rounds: int) -> None:
    """A step against x W_enc, f W_dec and the three products of their gradients: x itself needs none."""
    x = torch.relu(torch.randn(batch, d_in, device=device))
    wide = torch.randn(batch, d_in * expansion, device=device)
    matrix = torch.randn(d_in, d_in * expansion, device=device)
    learners = {kind: Learner(Sae(SaeConfig(d_in, expansion, kind)).to(device), 1e-4) for kind in KINDS}

    def products() -> None:
        for _ in range(2):
            x @ matrix, x.mT @ wide
        wide @ matrix.mT

    calls: dict[str, Callable[[], object]] = {"products": products}
    calls |= {kind: lambda each=each: each.step(x) for kind, each in learners.items()}
    found = seconds(calls, device, rounds)
    told = ", ".join(f"{kind} {batch / found[kind]:,.0f} ({found['products'] / found[kind]:.0%})" for kind in KINDS)
    print(f"    {d_in} neurons, {d_in * expansion} features, {batch} tokens a step: {told}")


def trainings(name: str, preset: str, expansion: int, n_tokens: int, device: torch.device, **sizes) -> None:
    model = new_model(name, preset, device, **sizes)
    corpus = text_of(2 * n_tokens, model.config.vocab_size)
    pieces = [text.tokens.clamp(min=0) for text, _ in watch_neurons(model, corpus, 16, n_tokens=n_tokens, ahead=64)]
    n_layers, now = len(model.blocks), clock(device)

    @torch.no_grad()
    def forward() -> None:
        for tokens in pieces:
            model(tokens)

    def to_the_neurons() -> None:
        for _ in watch_neurons(model, corpus, 16, n_tokens=n_tokens, ahead=64):
            pass

    found = seconds({"forward": forward, "to the neurons": to_the_neurons}, device, 2)
    told = []
    for kind in KINDS:
        config = SaeConfig(model.config.n_neurons, expansion, kind)
        recipe = SaeRecipe(max_tokens=n_tokens, evaluations=1, validation_tokens=100, resample_at=(), buffer=16_384)
        start = now()
        tokens = train_saes(model, corpus, corpus, config, recipe=recipe).curve[-1]["tokens"]
        took = now() - start
        share = found["to the neurons"] / n_tokens * tokens / took
        told.append(f"{kind} {tokens / took:,.0f} tokens/s, {share:.0%} of it the model's")
    print(
        f"    {name} {preset}, {n_layers} layers, forward alone {n_tokens / found['forward']:,.0f} tokens/s: ", end=""
    )
    print("; ".join(told))


def memory(preset: str, expansion: int, n_tokens: int, sizes: dict[str, int]) -> float:
    """MB beside the model in a process of its own."""
    arguments = [preset, expansion, n_tokens, *(f"{key}={value}" for key, value in sizes.items())]
    command = [sys.executable, __file__, "--alone", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def train_alone(preset: str, expansion: int, n_tokens: int, sizes: dict[str, int]) -> None:
    device = cl.best_device()
    model = new_model("Gpt2", preset, device, **sizes)
    corpus = text_of(50_000, model.config.vocab_size)
    config = SaeConfig(model.config.n_neurons, expansion)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_of_process()
    with tempfile.TemporaryDirectory() as folder:
        recipe = SaeRecipe(max_tokens=n_tokens, buffer=16_384, least_gain=-1e9)
        train_saes(model, corpus, corpus, config, recipe=recipe, run_dir=folder)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_of_process()
    print(f"{(peak - before) / 1e6:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        preset, expansion, n_tokens, *sizes = arguments.alone
        overrides = {key: int(value) for key, value in (size.split("=") for size in sizes)}
        return train_alone(preset, int(expansion), int(n_tokens), overrides)
    toy, device = arguments.toy, cl.best_device()
    slow = device.type == "cpu"
    print(f"device {device}, threads {torch.get_num_threads()}")
    print("a step, in tokens/s, and the share of its time that five products would take:")
    for d_in, expansion, batch in [(64, 4, 256)] if toy else [(256, 4, 256), (512, 16, 256), (512, 16, 1024)]:
        steps(d_in, expansion, batch, device, 3 if slow else 20)
    print("trainings of all layers together:")
    small = dict(vocab_size=256, context=64) if toy else dict(vocab_size=512, context=128)
    for name in "Crate", "Gpt2":
        trainings(name, "toy", 4, 4_000 if toy else 50_000, device, **small)
    if not toy:
        trainings("Gpt2", "3L", 4 if slow else 16, 8_000 if slow else 500_000, device, vocab_size=4096, context=256)
    lengths = (5_000, 20_000) if toy else (25_000, 100_000)
    peaks = ", ".join(f"{memory('toy', 4, n, small):.0f} MB at {n} tokens" for n in lengths)
    print(f"memory beside the model, toy GPT-2, buffer 16,384 tokens: {peaks}")


if __name__ == "__main__":
    main()
