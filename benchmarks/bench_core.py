"""Speed and memory of the mathematical core and of generation, each against a stated peer.

| what | peer |
|---|---|
| coding rate | torch.logdet of I + d/(nε²)ZᵀZ in double precision, always d×d |
| gradient of R^c | autograd through `subspace_rate` |
| ISTA layer | the definition with its five products |
| MSSA | attention with three projections (the same width and heads) |
| generation with a cache | the same without |

    python benchmarks/bench_core.py            a size that suits the device
    python benchmarks/bench_core.py --toy      seconds, to see that it runs
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import cratelab as cl
from cratelab.gpt2 import Attention


def seconds(call: Callable[[], object], at_least: float = 1.0) -> float:
    """The fastest of the runs that fit into `at_least` seconds, one at least, after others to warm up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=at_least).times)


def plain_rate(z: torch.Tensor, eps: float = 0.5) -> torch.Tensor:
    n, d = z.shape[-2:]
    z = z.double()
    return 0.5 * torch.logdet(torch.eye(d, device=z.device, dtype=z.dtype) + d / (n * eps**2) * z.mT @ z)


def five_products(z: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    code = F.relu(0.1 * (z @ D) - 0.01)
    code = F.relu(code - 0.1 * ((code @ D.mT) @ D - z @ D) - 0.01)
    return code @ D.mT


def train_step(layer: Callable, z: torch.Tensor) -> None:
    layer(z).square().sum().backward()


def autograd_gradient(z: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(cl.subspace_rate(z, U).sum(), z)[0]


@torch.no_grad()
def generate_without_cache(model: cl.LanguageModel, tokens: torch.Tensor, n_new: int) -> torch.Tensor:
    for _ in range(n_new):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    device = cl.best_device()
    torch.set_default_device(device)
    b, n, d, k = (2, 64, 32, 4) if toy else (8, 512, 384, 6) if device.type == "cpu" else (64, 1024, 768, 12)
    z = F.layer_norm(torch.randn(b, n, d), (d,))
    U = torch.linalg.qr(torch.randn(k, d, d // k)).Q
    short = z[:, : n // 8].contiguous()
    ista, mssa = cl.Ista(d), cl.Mssa(d, k)
    attention = Attention(cl.Gpt2Config(n_layers=1, n_heads=k, width=d))
    print(f"device {device}, threads {torch.get_num_threads()}, tokens ({b}, {n}, {d}), {k} subspaces")
    print(f"{'':44}{'ours':>10}{'peer':>10}   peer/ours")

    def compare(label: str, ours: Callable[[], object], peer: Callable[[], object]) -> None:
        mine, theirs = seconds(ours), seconds(peer)
        print(f"{label:44}{1e3 * mine:8.1f}ms{1e3 * theirs:8.1f}ms   {theirs / mine:8.2f}")

    compare(f"coding rate, n = {n}", lambda: cl.coding_rate(z), lambda: plain_rate(z))
    compare(f"coding rate, n = {n // 8}", lambda: cl.coding_rate(short), lambda: plain_rate(short))
    compare("gradient of R^c", lambda: cl.subspace_rate_gradient(z, U), lambda: autograd_gradient(z, U))
    ista_peer = lambda z: five_products(z, ista.D)  # noqa: E731
    compare("ISTA layer, forward and backward", lambda: train_step(ista, z), lambda: train_step(ista_peer, z))
    compare("MSSA layer, forward and backward", lambda: train_step(mssa, z), lambda: train_step(attention, z))
    for model in cl.Crate(cl.CrateConfig.preset("toy", context=256)), cl.Gpt2(cl.Gpt2Config.preset("toy", context=256)):
        prompt = torch.zeros(1, 8, dtype=torch.long)
        n_new = 16 if toy else 240
        compare(
            f"{type(model).__name__} toy, {n_new} new tokens",
            lambda: model.generate(prompt, n_new, temperature=0),  # noqa: B023
            lambda: generate_without_cache(model, prompt, n_new),  # noqa: B023
        )
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.new_cache(1))
        print(f"{'':4}cache of a sequence: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
