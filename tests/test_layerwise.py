import math

import pytest
import torch
from scipy.stats import entropy
from sklearn.linear_model import Lasso
from torch.testing import assert_close

import cratelab as cl
from cratelab.layerwise import attention_spectra, effective_rank, layer_statistics, subspaces, token_lengths

from conftest import tokens

SMALL = dict(n_layers=2, n_heads=2, width=16, vocab_size=50, context=12)


def models(**options):
    torch.manual_seed(0)
    both = (cl.Crate(cl.CrateConfig(**SMALL | options)), cl.Gpt2(cl.Gpt2Config(**SMALL | options)))
    with torch.no_grad():
        for model in both:
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return both


@pytest.mark.parametrize("model", models(), ids=["crate", "gpt2"])
def test_lengths_of_tokens_are_those_of_a_walk_through_the_blocks(model):
    batches = [torch.randint(50, (b, 10)) for b in (3, 1)]
    model.to(batches[0].device)
    found = token_lengths(model, batches)
    with torch.no_grad():
        x = torch.cat([model.token_embedding(batch) for batch in batches]) + model.position_embedding.weight[:10]
        for i, block in enumerate(model.blocks):
            assert float(found[i]) == pytest.approx(float(block.attention_norm(x).norm(dim=-1).mean()), rel=1e-5)
            x = block(x)
    assert_close(found, layer_statistics(model, batches)["length"])
    assert not any(block.attention_norm._forward_hooks for block in model.blocks)
    with pytest.raises(ValueError, match="token_lengths needs at least one batch of tokens; got none"):
        token_lengths(model, [])


@pytest.mark.parametrize("model", models(), ids=["crate", "gpt2"])
def test_rates_and_sparsity_are_those_of_a_walk_through_the_blocks(model):
    batches = [torch.randint(50, (b, 10)) for b in (3, 1)]
    model.to(batches[0].device)
    found = layer_statistics(model, batches, eps=0.7)
    with torch.no_grad():
        x = torch.cat([model.token_embedding(batch) for batch in batches]) + model.position_embedding.weight[:10]
        for i, (block, U) in enumerate(zip(model.blocks, subspaces(model), strict=True)):
            seen = block.attention_norm(x)
            after = block.attention_norm(x + block.attention(seen))
            for when, z in ("before", seen), ("after", after):
                z, bases = z.double().cpu(), U.double().cpu()
                # sequence by sequence and subspace by subspace, on orthonormal bases from an SVD in place of QR
                rates = [cl.coding_rate(sequence, 0.7) for sequence in z]
                learned = [sum(cl.coding_rate(sequence @ U_k, 0.7) for U_k in bases) for sequence in z]
                svd = [torch.linalg.svd(U_k, full_matrices=False)[0] for U_k in bases]
                flat = [sum(cl.coding_rate(sequence @ U_k, 0.7) for U_k in svd) for sequence in z]
                for name, values in ("R", rates), ("R^c", learned), ("R^c orthonormal", flat):
                    assert_close(found[f"{name} {when}"][i], torch.stack(values).mean(), rtol=1e-5, atol=1e-5)
            codes = []
            hook = block.neurons.register_forward_hook(lambda module, inputs, code: codes.append(code))  # noqa: B023
            x = block(x)
            hook.remove()
            few = 2 / codes[0].numel()  # a code at the threshold may fall on either side
            assert_close(found["active"][i], (codes[0] > 0).double().mean().cpu(), rtol=0, atol=few)


@pytest.mark.parametrize("span", [None, 0, 3])
@pytest.mark.parametrize("kind", [0, 1], ids=["crate", "gpt2"])
@torch.no_grad()
def test_controls_are_those_of_a_loop_over_tokens(kind, span):
    model, batch = models(span=span)[kind], torch.randint(50, (3, 7))
    model.to(batch.device)
    found = layer_statistics(model, [batch[:2], batch[2:]], eps=0.7)
    x = model.token_embedding(batch) + model.position_embedding.weight[:7]
    for i, (block, U) in enumerate(zip(model.blocks, subspaces(model), strict=True)):
        out, seen = block.attention.output, block.attention_norm(x)
        maps = {"identity": torch.zeros_like(x), "uniform": torch.zeros_like(x)}
        for b in range(3):
            for token in range(7):
                first = 0 if span is None else max(0, token - span)
                for name, sees in ("identity", [token]), ("uniform", range(first, token + 1)):
                    for k, U_k in enumerate(U):  # a head writes through its own eight columns of the output matrix
                        fetched = sum(seen[b, j] @ U_k for j in sees) / len(sees)
                        maps[name][b, token] += out.weight[:, 8 * k : 8 * k + 8] @ fetched
                    maps[name][b, token] += 0 if out.bias is None else out.bias
        for name, update in maps.items():
            after = block.attention_norm(x + update).double().cpu()
            svd = [torch.linalg.svd(U_k, full_matrices=False)[0] for U_k in U.double().cpu()]
            flat = [sum(cl.coding_rate(sequence @ U_k, 0.7) for U_k in svd) for sequence in after]
            assert_close(found[f"R {name}"][i], cl.coding_rate(after, 0.7).mean(), rtol=1e-5, atol=1e-5)
            assert_close(found[f"R^c orthonormal {name}"][i], torch.stack(flat).mean(), rtol=1e-5, atol=1e-5)
            if span == 0:  # a network without context sees as the controls do
                assert_close(found[f"R^c {name}"][i], found["R^c after"][i], rtol=1e-5, atol=1e-5)
        half = x + block.attention(seen)
        lengths = [
            float((new - old).norm() / old.norm()) for new, old in zip(half.view(-1, 16), x.view(-1, 16), strict=True)
        ]
        assert abs(float(found["update"][i]) - sum(lengths) / len(lengths)) < 1e-4
        x = block(x)


@pytest.mark.parametrize("kind", [0, 1], ids=["crate", "gpt2"])
def test_each_layer_may_have_a_precision_of_its_own(kind):
    model, batch = models()[kind], torch.randint(50, (3, 10))
    model.to(batch.device)
    with torch.no_grad():
        first, second = (layer_statistics(model, [batch], eps=eps) for eps in (0.7, 0.2))
        both = layer_statistics(model, [batch], eps=torch.tensor([0.7, 0.2]))
        x = model.token_embedding(batch) + model.position_embedding.weight[:10]
        for i, block in enumerate(model.blocks):
            lengths = [float(token.norm()) for token in block.attention_norm(x).flatten(0, 1)]
            assert abs(float(both["length"][i]) - sum(lengths) / len(lengths)) < 1e-4
            x = block(x)
    for name, values in both.items():
        assert_close(values, torch.stack([first[name][0], second[name][1]]))


@pytest.mark.parametrize("kind", [0, 1], ids=["crate", "gpt2"])
def test_random_subspaces(kind):
    batch = torch.randint(50, (3, 10))
    whole = models(n_heads=1)[kind].to(batch.device)  # every basis of the whole space codes alike
    found = layer_statistics(whole, [batch])
    for when in ("before", "after", "identity", "uniform"):
        assert_close(found[f"R^c random {when}"], found[f"R {when}"], rtol=1e-5, atol=1e-5)
    two = models()[kind].to(batch.device)
    first, again, other = (layer_statistics(two, [batch], seed=seed) for seed in (0, 0, 1))
    assert_close(first, again)
    changed = {name for name in first if not torch.allclose(first[name], other[name], rtol=1e-5)}
    assert changed == {f"R^c random {when}" for when in ("before", "after", "identity", "uniform")}
    assert (first["R^c random before"][0] - first["R^c random before"][1]).abs() > 1e-3  # each layer has its own


@pytest.mark.parametrize("kind", [0, 1], ids=["crate", "gpt2"])
def test_the_spectrum_is_that_of_a_lone_tokens_jacobian(kind):
    model = models()[kind].double()
    spectra = attention_spectra(model)
    assert spectra.shape == (2, 16) and spectra.dtype == torch.float64
    for spectrum, block in zip(spectra, model.blocks, strict=True):
        z = torch.randn(16, dtype=torch.float64, device=model.token_embedding.weight.device)
        jacobian = torch.autograd.functional.jacobian(lambda z: block.attention(z[None, None])[0, 0], z)  # noqa: B023
        assert_close(spectrum, torch.linalg.svdvals(jacobian).cpu())


def test_effective_rank_is_exp_of_the_entropy_of_the_energy():
    for spectrum in torch.eye(5)[0] * 3, torch.tensor([2.0, 2, 2, 0, 0]), torch.rand(5):
        assert_close(float(effective_rank(spectrum)), math.exp(entropy(spectrum.square())), rtol=1e-5, atol=0)
    assert_close(effective_rank(torch.tensor([[2.0, 2, 2, 0], [1, 0, 0, 0]])), torch.tensor([3.0, 1.0]))


def test_gpt2s_subspaces_are_what_its_values_read():
    gpt2 = models()[1]
    x = tokens(1, n=4, d=16, dtype=torch.float32)
    gpt2.to(x.device)
    values = gpt2.blocks[0].attention.projection(x)[..., 32:]
    assert_close(cl.project(x, subspaces(gpt2)[0])[0].movedim(0, 1).flatten(1), values[0])


def test_lasso_objectives_are_those_of_scikit_learn():
    crate = models()[0]
    batch = torch.randint(50, (1, 6))
    found = layer_statistics(crate.to(batch.device), [batch], lasso_steps=20_000)
    with torch.no_grad():
        block = crate.blocks[0]
        x = crate.token_embedding(batch) + crate.position_embedding.weight[:6]
        target = block.ista_norm(x + block.attention(block.attention_norm(x)))[0]
        D = block.ista.D.double().cpu().numpy()
        objectives = []
        for token in target.double().cpu().numpy():
            lasso = Lasso(alpha=0.1 / 16, positive=True, fit_intercept=False, tol=1e-12, max_iter=1_000_000)
            code = lasso.fit(D, token).coef_
            objectives.append(0.5 * ((token - D @ code) ** 2).sum() + 0.1 * code.sum())
    assert abs(float(found["converged lasso objective"][0]) / (sum(objectives) / 6) - 1) < 1e-3
    assert (found["lasso objective"] > found["converged lasso objective"]).all()
    assert (found["lasso active"] < found["active"]).all()


def test_one_batch_or_many_is_the_same_and_hooks_are_gone_afterwards():
    crate = models()[0]
    batch = torch.randint(50, (6, 8))
    crate.to(batch.device)
    whole, parts = layer_statistics(crate, [batch]), layer_statistics(crate, iter(batch.split(2)))
    for name in whole:
        assert_close(whole[name], parts[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="context"):
        layer_statistics(crate, [torch.zeros(1, 99, dtype=torch.long)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in crate.modules())


def test_wrong_requests_are_named():
    crate, gpt2 = models()
    with pytest.raises(ValueError, match="at least one batch"):
        layer_statistics(crate, [])
    with pytest.raises(ValueError, match="ISTA layers; got Gpt2"):
        layer_statistics(gpt2, [torch.zeros(1, 2, dtype=torch.long)], lasso_steps=5)
    batch = torch.zeros(1, 2, dtype=torch.long)
    for batches, options, message in (
        ([torch.full((1, 2), 50)], {}, "contexts must be integers from 0 to 49; got torch.int64, 50 to 50"),
        ([torch.zeros(1, 0, dtype=torch.long)], {}, r"contexts must be \(c, n\)"),
        ([torch.zeros(2)], {}, r"contexts must be \(c, n\)"),
        ([batch], dict(eps=float("nan")), "precision eps must be positive.*; got nan"),
        ([batch], dict(eps=[0.5]), "one for each of 2 layers; got 1"),
        ([batch], dict(eps=[0.5, -1.0]), "precision eps must be positive.*; got -1"),
        ([batch], dict(seed=-1), "seed must be from 0"),
        ([batch], dict(lasso_steps=-1), "lasso_steps must be at least 0"),
        ([batch], dict(lasso_steps=0.5), "lasso_steps must be at least 0, a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_statistics(crate, batches, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in crate.modules())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.parametrize("kind, lasso_steps", [(0, 20), (1, 0)])
def test_models_of_every_precision_are_measured_alike(kind, lasso_steps, dtype, tolerance):
    batch = torch.randint(50, (3, 10))
    exact, rounded = models()[kind].to(batch.device), models()[kind].to(batch.device, dtype)
    found, expected = (layer_statistics(model, [batch], lasso_steps=lasso_steps) for model in (rounded, exact))
    for name, values in expected.items():
        assert_close(found[name], values, rtol=tolerance, atol=tolerance)


def test_a_dictionary_of_zeros_is_its_own_lasso():
    crate = models()[0]
    with torch.no_grad():
        crate.blocks[0].ista.weight.zero_()
    found = layer_statistics(crate, [torch.randint(50, (3, 10))], lasso_steps=5)
    assert found["active"][0] == found["lasso active"][0] == 0
    assert found["converged lasso objective"][0] == found["lasso objective"][0] > 0
