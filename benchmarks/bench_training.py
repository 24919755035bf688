"""Speed and memory of training CRATE, forward and backward.

| what | peer | target |
|---|---|---|
| time of a block | the official block, operation by operation | 1.2 × as fast on a CPU, 1.3 × on a GPU |
| what it saves for the backward pass | the same | at most 0.8 × |
| time of a block, of a model | GPT-2 of the same width and depth | at most 1.5 × |
| model FLOPs a second, preset S | the rate of a large matrix product, measured beside it | at least 40 % on a GPU |

Model FLOPs are those of the products the mathematics needs, 6 × (18d² or 12d², n·d for causal attention) a token and
layer and 6·v·d for the head. What CRATE recomputes, 8d² a token and layer, is work but not in them.

Rounds interleave ours and the peers: a ratio is the median over rounds, a time the least. On a GPU the dtype is bf16
by autocast, and each row is repeated under torch.compile (elsewhere with --compile).

    python benchmarks/bench_training.py            sizes that suit the device; on a CPU about 3 minutes
    python benchmarks/bench_training.py --toy      seconds, to see that it runs
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
import torch.nn.functional as F
from bench_core import five_products, seconds
from einops import rearrange
from torch import Tensor
from torch.utils.benchmark import timer

import cratelab as cl
from cratelab.crate import CrateBlock
from cratelab.gpt2 import Gpt2Block


class OfficialBlock(CrateBlock):
    """The block as the official code computes it, operation by operation."""

    def forward(self, x: Tensor, cache: None = None, position: int = 0) -> Tensor:
        w = self.attention.projection(self.attention_norm(x))
        w = rearrange(w, "b n (k p) -> b k n p", k=self.attention.n_heads)
        attended = F.scaled_dot_product_attention(w, w, w, is_causal=True)
        x = x + self.attention.output(rearrange(attended, "b k n p -> b n (k p)"))
        return five_products(self.ista_norm(x), self.ista.D)


def official(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes as officially, with the parameters of `module` themselves."""
    copy = deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for part in copy.modules():
        if isinstance(part, CrateBlock):
            part.__class__ = OfficialBlock
    return copy


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a round to warm up.

    PyTorch's Timer ends with one call before it begins the next, so that what slows the machine would slow one alone.
    """
    taken = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = timer()
            call()
            taken[name].append(timer() - start)
    return {name: times[1:] for name, times in taken.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))


def saved_bytes(forward: Callable[[], Tensor], module: torch.nn.Module) -> int:
    """Bytes that `forward` keeps for the backward pass, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    held = {}

    @torch.compiler.disable  # else what is compiled is compiled again, hook and all
    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until the count is made, so that no address is used twice
    total = sum(size for address, size in held.items() if address not in parameters)
    del result
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a step holds on the GPU at once, beside what was there before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def model_flops(model: cl.LanguageModel, n: int) -> int:
    """FLOPs a token of forward and backward, recomputation left out."""
    c, d = model.config, model.config.width
    matrices = (2 + 2 * c.n_steps * c.expansion if isinstance(model, cl.Crate) else 4 + 2 * c.expansion) * d**2
    return 6 * (c.n_layers * (matrices + n * d) + c.vocab_size * d)


class Bench:
    """What all rows share: device, dtype, sizes. A row is a dict of numbers; of times the least over the rounds."""

    def __init__(self, toy: bool, compiled: bool):
        self.toy, self.device = toy, cl.best_device()
        gpu = self.device.type == "cuda"
        self.modes = [False, True] if gpu or compiled else [False]
        self.dtype = torch.bfloat16 if gpu else torch.float32
        # (batch, tokens) for each preset; in whole models the logits over 50,304 words take most of the memory
        self.block_sizes = {"3L": (64, 1024), "S": (32, 1024)} if gpu else {"1L": (16, 256), "S": (4, 256)}
        large = gpu and torch.cuda.get_device_properties(self.device).total_memory > 60e9
        batch = 32 if large else 8
        self.model_sizes = dict.fromkeys(("3L", "S"), (batch, 1024)) if gpu else {"1L": (2, 256), "S": (1, 256)}
        n = 256 if toy else 8192 if gpu else 1024
        self.product = torch.randn(2, n, n, device=self.device).to(self.dtype)
        if toy:
            self.block_sizes = self.model_sizes = {"toy": (2, 64)}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def block(self, preset: str, compiled: bool) -> dict:
        b, n = self.block_sizes[preset]
        config = cl.CrateConfig.preset(preset, n_layers=1)
        ours = CrateBlock(config)
        modules = {"CRATE": ours, "official": official(ours), "GPT-2": Gpt2Block(cl.Gpt2Config.preset(preset))}
        x = torch.randn(b, n, config.width, requires_grad=True)
        grad = torch.randn(b, n, config.width)

        def forward(module: Callable) -> Tensor:
            with self.autocast():
                return module(x)

        variants = compile_all(modules, compiled)
        calls = {name: lambda module=module: forward(module).backward(grad) for name, module in variants.items()}
        taken = interleaved(calls, 3 if self.toy else 9)
        saved = {name: saved_bytes(lambda module=variants[name]: forward(module), modules[name]) for name in modules}
        return {
            "tokens": [b, n],
            "width": config.width,
            "seconds": {name: min(times) for name, times in taken.items()},
            "official / CRATE": ratio(taken["official"], taken["CRATE"]),
            "CRATE / GPT-2": ratio(taken["CRATE"], taken["GPT-2"]),
            "saved bytes": saved,
        }

    def model(self, preset: str, compiled: bool) -> dict:
        b, n = self.model_sizes[preset]
        ours = cl.Crate(cl.CrateConfig.preset(preset))
        modules = {"CRATE": ours, "official": official(ours), "GPT-2": cl.Gpt2(cl.Gpt2Config.preset(preset))}
        tokens = torch.randint(ours.config.vocab_size, (b, n + 1))

        def loss(model: Callable) -> Tensor:
            with self.autocast():
                return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        variants = compile_all(modules, compiled)
        calls = {name: lambda model=model: loss(model).backward() for name, model in variants.items()}
        calls["product"] = lambda: self.product[0] @ self.product[1]
        taken = interleaved(calls, 3 if self.toy else 5)
        product = 2 * self.product.shape[1] ** 3
        row = {"tokens": [b, n], "product FLOP/s": product / min(taken["product"])}
        for name, model in modules.items():
            calls[name]()
            update = seconds(torch.optim.AdamW(model.parameters(), fused=True).step)
            model.zero_grad()
            if self.device.type == "cuda":
                held = {"peak bytes": peak_bytes(calls[name], self.device)}
            else:
                held = {"saved bytes": saved_bytes(lambda model=variants[name]: loss(model), model)}
            row[name] = held | {
                "seconds": min(taken[name]),
                "update seconds": update,
                "share of product": model_flops(model, n) * b * n / product * ratio(taken["product"], taken[name]),
                "over CRATE": ratio(taken[name], taken["CRATE"]),
            }
        return row

    def blocks(self) -> None:
        print(
            f"{'block, forward and backward':32}{'ours':>10}{'official':>10}{'GPT-2':>10}   official/ours  ours/GPT-2"
            "   saved by ours, official, GPT-2 (ours/official)"
        )
        for preset, (b, n) in self.block_sizes.items():
            for compiled in self.modes:
                row = self.block(preset, compiled)
                width, saved = row["width"], row["saved bytes"]
                print(
                    f"{label(f'd = {width}, ({b}, {n}) tokens', compiled):32}"
                    + "".join(f"{1e3 * least:8.1f}ms" for least in row["seconds"].values())
                    + f"{row['official / CRATE']:16.2f}{row['CRATE / GPT-2']:12.2f}"
                    + "".join(f"{size / 2**20:9.1f}" for size in saved.values())
                    + f" MiB ({saved['CRATE'] / saved['official']:.2f})"
                )

    def models(self) -> None:
        memory = "peak GiB" if self.device.type == "cuda" else "saved MiB"
        print(
            f"{'model, forward and backward':32}{'tokens/s':>12}{'with AdamW':>12}{memory:>11}"
            f"{'of product':>11}   time/ours"
        )
        for preset, (b, n) in self.model_sizes.items():
            for compiled in self.modes:
                row = self.model(preset, compiled)
                print(f"matrix product at {row['product FLOP/s'] / 1e12:.3g} TFLOP/s")
                for name in "CRATE", "official", "GPT-2":
                    one = row[name]
                    held = one["peak bytes"] / 2**30 if "peak bytes" in one else one["saved bytes"] / 2**20
                    print(
                        f"{label(f'{name} {preset}, ({b}, {n}) tokens', compiled):32}{b * n / one['seconds']:12,.0f}"
                        f"{b * n / (one['seconds'] + one['update seconds']):12,.0f}{held:11.2f}"
                        f"{one['share of product']:11.0%}{one['over CRATE']:12.2f}"
                    )


def compile_all(modules: dict[str, torch.nn.Module], wanted: bool) -> dict[str, Callable]:
    return {name: torch.compile(module) if wanted else module for name, module in modules.items()}


def label(name: str, compiled: bool) -> str:
    return name + (" compiled" if compiled else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile where there is no GPU, too")
    arguments = parser.parse_args()
    bench = Bench(arguments.toy, arguments.compile)
    torch.set_default_device(bench.device)
    for threads in sorted({1, torch.get_num_threads()}) if bench.device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        print(f"device {bench.device}, threads {threads}, {bench.dtype}")
        bench.blocks()
        bench.models()


if __name__ == "__main__":
    main()
