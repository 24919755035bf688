import pytest
import torch
from torch import nn

from cratelab.reading import hooked


def test_hooks_see_and_replace_what_a_module_gives_and_are_gone_afterwards():
    module, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    plain = module(x)
    module.register_forward_hook(lambda module, inputs, output: seen.append(("own", inputs[0], output)))
    hooks = (module, lambda m, inputs, output: 2 * output), (module, lambda m, inputs, output: output + 1)
    with hooked(*hooks):
        torch.testing.assert_close(module(x), 2 * plain + 1)
    with hooked(*hooks, prepend=True):
        torch.testing.assert_close(module(x), 2 * (plain + 1))
    torch.testing.assert_close(module(x), plain)
    assert all(torch.equal(inputs, x) for _, inputs, _ in seen)
    for (_, _, output), expected in zip(seen, (plain, 2 * (plain + 1), plain), strict=True):
        torch.testing.assert_close(output, expected)


def test_hooks_are_removed_whatever_happens():
    module = nn.Identity()
    with pytest.raises(ZeroDivisionError), hooked((module, lambda m, inputs, output: 1 / 0)):
        module(torch.zeros(1))
    with pytest.raises(AttributeError), hooked((module, lambda *_: None), ("no module", print)):
        pass
    assert not module._forward_hooks
