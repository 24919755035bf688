"""`import cratelab` and `cratelab --help` load only what they need, whatever is imported first."""

import subprocess
import sys
from typing import get_args

import pytest

import cratelab as cl
from cratelab.cli import options
from cratelab.interpret.scores import PROTOCOLS


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_torch():
    code = "import sys; from contextlib import suppress; from cratelab.cli import main\n"
    code += "with suppress(SystemExit): main(['--help'])\n"
    assert "reproduce" in run(code + "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")


@pytest.mark.parametrize("first", ["ista", "coding_rate", "mssa"])
def test_a_function_is_not_hidden_by_its_module(first):
    run(f"import importlib; importlib.import_module('cratelab.{first}')\nimport cratelab as cl; cl.{first}.__code__")


def test_all_names_are_there():
    assert {"Crate", "load", "ista", "corpora"} <= set(cl.__all__) <= set(dir(cl)) and all(
        hasattr(cl, name) for name in cl.__all__
    )
    with pytest.raises(AttributeError, match="no_such_name"):
        cl.no_such_name  # noqa: B018


def test_a_model_is_loaded_in_a_process_that_has_made_none(tmp_path):
    cl.Gpt2(cl.Gpt2Config(n_layers=1, n_heads=1, width=4, vocab_size=9, context=5)).save(tmp_path)
    assert "Gpt2" in run(f"import cratelab as cl; print(cl.load({str(tmp_path)!r}))")


def test_the_options_offer_what_there_is():
    assert get_args(options.Preset) == tuple(cl.LanguageModelConfig.presets)
    assert get_args(options.ScoringProtocol) == PROTOCOLS == options.Interpret.protocols
