"""lm-evaluation-harness asks an exported CRATE; cratelab's own model says what it must find."""

import json
import math
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from cratelab.corpora.pydocs import standard_library
from cratelab.experiments.reference_models import load_reference_tokenizer

OURS_ALONE = TaskManager(include_defaults=False)  # the thousands of its own take half a minute to list
QUESTIONS = [
    {"question": "Return the number of", "choices": [" bytes", " the", " cats"], "answer": 0},
    {"question": "Raise a ValueError", "choices": [" is", " if the"], "answer": 1},
    {"question": "The default value", "choices": [" is", " of a", " None"], "answer": 0},
]
PROMPTS = ["Return a list of", "If the file does not", "This module"]
TEXTS = [next(standard_library()).text[:length] for length in (100, 2000)]  # one shorter than the context, one longer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Path]:
    """A file for each of three tasks, of a folder for --include_path."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = {
        "choice": (
            QUESTIONS,
            {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
        ),
        "rolling": ([{"text": text} for text in TEXTS], {"doc_to_text": "", "doc_to_target": "{{text}}"}),
        "generation": ([{"text": text} for text in PROMPTS], {"doc_to_text": "{{text}}", "doc_to_target": ""}),
    }
    more = {
        "choice": {"output_type": "multiple_choice"},
        "rolling": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]},
        "generation": {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["<|endoftext|>"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, (rows, asked) in kinds.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        task = {"task": name, "test_split": "test", "target_delimiter": ""} | data | asked | more[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return {name: folder / f"{name}.yaml" for name in kinds}


@pytest.fixture(scope="module")
def answers(exported, tasks) -> dict:
    return lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(exported), "trust_remote_code": True},
        [yaml.safe_load(file.read_text()) for file in tasks.values()],
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=OURS_ALONE,
    )


@torch.no_grad()
def nats(crate, given: list[int], then: list[int]) -> float:
    """-log p of the tokens `then` after those `given`, at most a context of both."""
    tokens = torch.tensor([given + then])
    log_probs = crate(tokens)[0].log_softmax(-1)
    return -float(log_probs[len(given) - 1 : -1].gather(1, tokens[0, len(given) :, None]).sum())


def test_the_likelihood_of_every_choice_is_ours(crate, answers):
    encode = load_reference_tokenizer().encode_ordinary
    expected = [
        [-nats(crate, encode(each["question"]), encode(choice)) for choice in each["choices"]] for each in QUESTIONS
    ]
    samples = sorted(answers["samples"]["choice"], key=lambda sample: sample["doc_id"])
    found = [[answer for answer, _ in sample["filtered_resps"]] for sample in samples]
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-5, atol=1e-4)
    right = [ours.index(max(ours)) == each["answer"] for ours, each in zip(expected, QUESTIONS, strict=True)]
    assert sum(right) > 0 and answers["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_bits_per_byte_of_texts_longer_and_shorter_than_the_context_are_ours(crate, answers):
    tokenizer, context, total = load_reference_tokenizer(), crate.config.context, 0.0
    for text in TEXTS:
        tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]  # the end of a text stands before the first
        for start in range(1, len(tokens), context):  # each token once, after as many as there is room for
            stop = min(start + context, len(tokens))
            first = max(stop - 1 - context, 0)
            with torch.no_grad():
                log_probs = crate(torch.tensor([tokens[first : stop - 1]]))[0].log_softmax(-1)
            targets = torch.tensor(tokens[start:stop])
            total -= float(log_probs[start - stop :].gather(1, targets[:, None]).sum())
    assert len(tokens) > 2 * context
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    found = answers["results"]["rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(total / n_bytes / math.log(2), rel=1e-5)


def test_what_it_lets_the_model_write_is_what_ours_writes(crate, answers):
    tokenizer = load_reference_tokenizer()
    samples = sorted(answers["samples"]["generation"], key=lambda sample: sample["doc_id"])
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        tokens = torch.tensor([tokenizer.encode_ordinary(prompt)])
        written = crate.generate(tokens, 12, temperature=0)[0, tokens.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(written.tolist())


def test_what_the_page_asks_is_answered_by_the_likelier_ending(crate, printed):
    names, encode = printed("lm-eval"), load_reference_tokenizer().encode_ordinary
    right = 0
    for question in names["questions"]:
        first, second = (nats(crate, encode(question["text"]), encode(ending)) for ending in question["endings"])
        right += first < second
    assert names["scores"]["acc,none"] == right / 2 == 1


def test_the_command_line_says_the_same(exported, tasks, answers, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={exported},trust_remote_code=True", "--tasks", ",".join(tasks)]
    command += ["--include_path", str(tasks["choice"].parent), "--output_path", str(tmp_path / "results.json")]
    subprocess.run(command, check=True, timeout=300)
    (file,) = tmp_path.glob("**/*.json")
    results = json.loads(file.read_text())["results"]
    for name, metric in ("choice", "acc,none"), ("rolling", "bits_per_byte,none"), ("generation", "exact_match,none"):
        assert results[name][metric] == pytest.approx(answers["results"][name][metric], rel=1e-6)


def test_without_its_codes_the_model_is_worse(exported, tasks):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    asked = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(exported, trust_remote_code=True))
    rolling = yaml.safe_load(tasks["rolling"].read_text())

    def bits() -> float:
        return lm_eval.simple_evaluate(asked, tasks=[rolling], bootstrap_iters=0, task_manager=OURS_ALONE)["results"][
            "rolling"
        ]["bits_per_byte,none"]

    whole = bits()
    model.model.blocks[1].neurons.register_forward_hook(lambda module, inputs, codes: torch.zeros_like(codes))
    assert bits() > whole + 0.1
