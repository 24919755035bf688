"""Speed and memory of collecting activation records of all neurons, and of scoring explanations of them.

| what | peer or limit |
|---|---|
| collecting records | 1.5 × the forward pass alone, on the same text in the same batches |
| memory beside the model | the same at two lengths of text; 4 GB at preset S |
| time and memory of the strongest excerpts | holding all activations and sorting them, neuron by neuron |
| scoring 10,000 neurons | a loop over neurons in plain Python; minutes |

    python benchmarks/bench_interpret.py            a size that suits the device
    python benchmarks/bench_interpret.py --toy      seconds, to see that it runs

On a CPU times are those of the process, so that other work on the machine counts less.
"""

import argparse
import re
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import timer

import cratelab as cl
from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.interpret.concepts import Concepts
from cratelab.interpret.excerpts import Excerpts
from cratelab.interpret.explainers import ConceptExplainer, SuffixExplainer, TokenExplainer
from cratelab.interpret.records import AHEAD, collect_records
from cratelab.interpret.scores import NEEDS, score
from cratelab.reading import NO_TOKEN, watch_neurons

PROTOCOLS = {"OpenAI": NEEDS["top-and-random"], "Anthropic": NEEDS["anthropic"]}
MODELS = {"Crate": cl.Crate, "Gpt2": cl.Gpt2}


def text_of(n_tokens: int, vocab_size: int, mean_length: int = 600) -> TokenizedCorpus:
    """Words with Zipf's frequencies, in documents of exponentially distributed lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.zipf(1.3, size=n_tokens).clip(1, vocab_size) - 1
    ends = np.sort(draw.choice(n_tokens, size=max(1, n_tokens // mean_length), replace=False))
    document = np.unique(np.searchsorted(ends, np.arange(n_tokens), side="right"), return_inverse=True)[1]
    return TokenizedCorpus.from_arrays(tokens, document, ["text"] * (document[-1] + 1), vocab_size)


def new_model(name: str, preset: str, device: torch.device, **overrides) -> cl.LanguageModel:
    torch.manual_seed(0)
    model = MODELS[name]
    return model(model.config_class.preset(preset, **overrides)).to(device).eval()


def clock(device: torch.device) -> Callable[[], float]:
    """Of the process on a CPU, where other work then counts less; elsewhere PyTorch's, which waits for the device."""
    return time.process_time if device.type == "cpu" else timer


def seconds(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """The fastest of several rounds, in each of which every call has its turn; PyTorch's Timer times one at a time."""
    now, best = clock(device), dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = now()
            call()
            best[name] = min(best[name], now() - start)
    return best


def collecting(name: str, preset: str, device: torch.device, n_tokens: int, batch: int, rounds: int, **sizes) -> dict:
    """Seconds of the forward pass, of that to the last neurons, and of each protocol's records, of one text."""
    model = new_model(name, preset, device, **sizes)
    corpus = text_of(n_tokens, model.config.vocab_size)
    pieces = [text for text, _ in watch_neurons(model, corpus, batch, ahead=AHEAD)]

    @torch.no_grad()
    def forward() -> None:
        for text in pieces:
            model(text.tokens.clamp(min=0))

    def to_the_neurons() -> None:
        for _ in watch_neurons(model, corpus, batch, ahead=AHEAD):
            pass

    calls: dict[str, Callable[[], object]] = {"forward": forward, "to the neurons": to_the_neurons}
    for protocol, needs in PROTOCOLS.items():
        calls[protocol] = lambda needs=needs: collect_records(model, corpus, batch=batch, **needs)
    found = seconds(calls, device, rounds)
    c = model.config
    print(f"{name} {preset}, {c.vocab_size} words, context {c.context}, {n_tokens} tokens in batches of {batch}:")
    print(f"    forward {found['forward']:.2f} s; without the head {found['to the neurons']:.2f} s")
    for protocol in PROTOCOLS:
        ratios = found[protocol] / found["forward"], found[protocol] / found["to the neurons"]
        print(f"    {protocol:10}{found[protocol]:8.2f} s, {ratios[0]:.2f} × forward ({ratios[1]:.2f} × without head)")
    return {"tokens": n_tokens, "batch": batch, "seconds": dict(found)}


def top_by_sorting(model: cl.LanguageModel, corpus: TokenizedCorpus, window: int, k: int) -> list[list[list[int]]]:
    """Where the k strongest windows of every neuron start: hold all, sort, walk down; windows as `collect_records`'."""
    held, first, length = [[] for _ in model.blocks], [], []
    for text, layers in watch_neurons(model, corpus, window=window):
        for all_of_it, activations in zip(held, layers, strict=True):
            all_of_it.append(activations[text.present].cpu())
        first.append((text.starts[:, None] + text.window_starts)[text.present].cpu())
        length.append(text.present.sum(1).cpu())
    starts = torch.cat(first).tolist()
    size = torch.cat(length)
    piece = torch.repeat_interleave(torch.arange(len(size)), size).tolist()
    found = []
    for parts in held:
        activations = torch.cat(parts).mT.contiguous()
        found.append([])
        for values in activations:
            order, kept = values.argsort(descending=True).tolist(), []
            for place in order:
                if len(kept) == k or values[place] <= 0:
                    break
                if all(piece[place] != p or abs(starts[place] - start) >= window for p, start in kept):
                    kept.append((piece[place], starts[place]))
            found[-1].append([start for _, start in kept])
    return found


def run_alone(what: str, name: str, preset: str, n_tokens: int, batch: int, sizes: dict[str, int]) -> None:
    """In a process of its own: seconds, and the peak of memory beside the model, in MB."""
    device = cl.best_device()
    model = new_model(name, preset, device, **sizes)
    corpus = text_of(n_tokens, model.config.vocab_size)
    collect_records(model, text_of(200, model.config.vocab_size), batch=1, **PROTOCOLS["OpenAI"])  # loads libraries
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = peak_of_process()
    start = time.process_time()
    if what == "sort":
        top_by_sorting(model, corpus, 64, 10)
    else:
        collect_records(model, corpus, batch=batch, **PROTOCOLS[what])
    took = time.process_time() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_of_process()
    print(f"{took:.2f} {(peak - before) / 1e6:.0f}")


def peak_of_process() -> int:
    """Bytes. Linux hands `ru_maxrss` down from the parent process, so there the kernel's own account is read."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(what: str, name: str, preset: str, n_tokens: int, batch: int = 16, **sizes) -> tuple[float, float]:
    arguments = [what, name, preset, n_tokens, batch, *(f"{key}={value}" for key, value in sizes.items())]
    command = [sys.executable, __file__, "--alone", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    took, peak = done.stdout.split()[-2:]
    return float(took), float(peak)


def random_excerpts(h: int, k: int, window: int, stream: torch.Tensor, seed: int) -> Excerpts:
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - window, (1, h, k), generator=draw)
    activations = torch.relu(torch.randn(1, h, k, window, generator=draw) - 1)
    tokens = stream[starts[..., None] + torch.arange(window)]
    return Excerpts(tokens.int(), activations, starts, torch.full_like(starts, window // 2))


def token_scores_in_a_loop(explain: Excerpts, validate: Excerpts) -> None:
    """What `TokenExplainer` and `score` do, one neuron at a time with dictionaries."""
    for neuron in range(explain.tokens.shape[1]):
        tokens, values = explain.tokens[0, neuron].flatten().tolist(), explain.activations[0, neuron].flatten().tolist()
        largest, table = max(values), defaultdict(list)
        for token, value in zip(tokens, values, strict=True):
            if token != NO_TOKEN:
                table[token].append(min(10, int(10 * value / largest)))
        means = {token: sum(seen) / len(seen) for token, seen in table.items()}
        simulated = [means.get(token, 0.0) for token in validate.tokens[0, neuron].flatten().tolist()]
        actual = validate.activations[0, neuron].flatten().numpy()
        np.corrcoef(actual, simulated)
        np.corrcoef(actual.argsort().argsort(), np.argsort(np.argsort(simulated)))


def scoring(h: int, n_concepts: int, rounds: int) -> None:
    stream = torch.from_numpy(text_of(200_000, 4096)[:])
    explain, validate = (random_excerpts(h, k, 64, stream, seed) for seed, k in ((1, 5), (2, 10)))
    truth = torch.rand(len(stream), n_concepts) < torch.rand(n_concepts) ** 3
    concepts = Concepts([str(i) for i in range(n_concepts)], truth)
    few = min(h, 200)
    part = [excerpts.map(lambda value: value[:, :few]) for excerpts in (explain, validate)]

    def both(explainer) -> None:
        simulated, coverage = explainer.explain(explain).simulate(validate)
        score(simulated, validate, coverage)

    both(TokenExplainer())  # loads libraries
    explainers = TokenExplainer(), SuffixExplainer(), ConceptExplainer(concepts)
    calls: dict[str, Callable[[], object]] = {type(e).__name__: lambda e=e: both(e) for e in explainers}
    calls["loop"] = lambda: token_scores_in_a_loop(*part)
    found = seconds(calls, torch.device("cpu"), rounds)
    print(f"scoring {h} neurons, 320 tokens to explain, 640 to validate, {n_concepts} concepts:")
    for name in list(calls)[:-1]:
        print(f"    {name:20}{found[name]:8.1f} s")
    print(f"    {'loop for tokens':20}{found['loop'] * h / few:8.1f} s (from {few} neurons)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        what, name, preset, n_tokens, batch, *sizes = arguments.alone
        overrides = {key: int(value) for key, value in (size.split("=") for size in sizes)}
        return run_alone(what, name, preset, int(n_tokens), int(batch), overrides)
    toy, device = arguments.toy, cl.best_device()
    slow = device.type == "cpu"
    print(f"device {device}, threads {torch.get_num_threads()}")

    small = dict(vocab_size=256, context=64) if toy else dict(vocab_size=4096, context=256)
    preset = "toy" if toy else "3L"
    for name in MODELS:
        collecting(name, preset, device, 4_000 if toy else 200_000, 16, 1 if toy else 3, **small)
    if not toy:
        n_tokens, batch = (8_192, 4) if slow else (1_000_000, 16)
        for name in MODELS:
            collecting(name, "S", device, n_tokens, batch, 1 if slow else 3)

    print("memory beside the model:")
    lengths = (2_000, 8_000) if toy else (50_000, 200_000)
    for protocol in PROTOCOLS:
        peaks = [alone(protocol, "Crate", preset, n, **small)[1] for n in lengths]
        print(f"    {preset}, {protocol}: " + ", ".join(f"{p:.0f} MB at {n} tokens" for n, p in zip(lengths, peaks)))  # noqa: B905
    if not toy:
        lengths = (16_384, 32_768) if slow else (200_000, 800_000)
        peaks = [alone("Anthropic", "Crate", "S", n)[1] for n in lengths]
        print("    S, Anthropic: " + ", ".join(f"{p:.0f} MB at {n} tokens" for n, p in zip(lengths, peaks)))  # noqa: B905

    n_tokens = 2_000 if toy else 100_000
    ours, theirs = (alone(what, "Crate", preset, n_tokens, **small) for what in ("OpenAI", "sort"))
    print(
        f"{preset}, {n_tokens} tokens: {ours[0]:.1f} s and {ours[1]:.0f} MB; held and sorted {theirs[0]:.1f} s, ",
        end="",
    )
    print(f"{theirs[1]:.0f} MB")
    scoring(200 if toy else 10_000, 20 if toy else 200, 1 if toy else 2)


if __name__ == "__main__":
    main()
