"""`cratelab export`: a trained model for Hugging Face transformers."""

from cratelab.cli.checks import check_folder, model_folder
from cratelab.cli.options import Export
from cratelab.corpora import tokenizers
from cratelab.extras import require
from cratelab.huggingface import to_huggingface
from cratelab.huggingface.card import model_card
from cratelab.huggingface.export import check_new
from cratelab.models import load
from cratelab.run_directory import read_metrics
from cratelab.storage import read_json
from cratelab.terminal import say


def check(options: Export) -> None:
    check_new(options.to)
    check_folder("--to", options.to)
    model_folder(options.model)
    require("transformers", "transformers").utils.logging.disable_progress_bar()


def run(options: Export) -> None:
    folder = model_folder(options.model)
    run_dir = folder.parent if (folder.parent / "run.json").is_file() else folder
    kept = options.tokenizer or run_dir / "tokenizer.json"
    if not kept.is_file():
        raise FileNotFoundError(f"there is no tokenizer {kept}: give --tokenizer FILE, such as a run's tokenizer.json")
    model, tokenizer = load(folder), tokenizers.load(kept)
    run = read_json(run_dir / "run.json") if run_dir != folder else {}
    losses = [row["validation_loss"] for row in read_metrics(run_dir) if "validation_loss" in row]
    card = model_card(model, options.to.resolve().name, run, losses[-1] if losses else None)
    to_huggingface(model, options.to, tokenizer, card)
    trust = ", trust_remote_code=True" if any(options.to.glob("*.py")) else ""
    say(f"AutoModelForCausalLM.from_pretrained({str(options.to)!r}{trust}) is the model; AutoTokenizer likewise")
