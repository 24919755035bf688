"""`cratelab export`: a trained model for Hugging Face transformers."""

from pathlib import Path

from cratelab.cli.checks import check_alone, check_folder, model_folder
from cratelab.cli.options import Export
from cratelab.cli.runs import load_model
from cratelab.corpora import tokenizers
from cratelab.corpora.token_store import tokenizer_facts
from cratelab.extras import require
from cratelab.huggingface import to_huggingface
from cratelab.huggingface.card import model_card
from cratelab.huggingface.export import check_new
from cratelab.run_directory import read_metrics
from cratelab.storage import read_json
from cratelab.terminal import say


def check(options: Export) -> None:
    check_alone("export")
    check_new(options.to)
    check_folder("--to", options.to)
    place = model_folder(options.model)
    if options.tokenizer is None and (place / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{place} is a folder for transformers already, with its tokenizer: copy it as it is, or give --tokenizer "
            "to write it anew"
        )
    require("transformers", "transformers").utils.logging.disable_progress_bar()


def run(options: Export) -> None:
    place = model_folder(options.model)
    run_dir = place.parent if place.is_file() or (place.parent / "run.json").is_file() else place
    tokenizer = _tokenizer(options.tokenizer or str(run_dir / "tokenizer.json"))
    model = load_model(place)
    run = read_json(run_dir / "run.json") if place == run_dir / "model" else {}
    theirs, ours = run.get("tokenizer"), tokenizer_facts(tokenizer)
    if isinstance(theirs, dict) and theirs.get("sha256", ours["sha256"]) != ours["sha256"]:
        raise ValueError(
            f"the model in {place} was trained on other tokens ({theirs.get('name')}, {theirs.get('n_vocab')}) than "
            f"--tokenizer makes ({ours['name']}, {ours['n_vocab']}): leave it out to take the run's own"
        )
    losses = [row["validation_loss"] for row in read_metrics(run_dir) if run and "validation_loss" in row]
    folder = options.to.resolve()
    card = model_card(model, folder.name, run, losses[-1] if losses else None)
    to_huggingface(model, folder, tokenizer, card)
    shown = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    trust = ", trust_remote_code=True" if any(folder.glob("*.py")) else ""
    say(
        f"AutoModelForCausalLM.from_pretrained({shown!r}{trust}) is the model, "
        f"PreTrainedTokenizerFast.from_pretrained({shown!r}) its tokenizer"
    )


def _tokenizer(name: str) -> tokenizers.Tokenizer:
    if name == "gpt2":
        return tokenizers.gpt2()
    if not Path(name).is_file():
        raise FileNotFoundError(f"no tokenizer {name}: give --tokenizer, gpt2 or a file such as a run's tokenizer.json")
    return tokenizers.load(name)
