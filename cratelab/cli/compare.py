"""`cratelab compare`: CRATE and GPT-2 on equal tokens."""

from cratelab import plots
from cratelab.cli.checks import (
    check_context,
    check_folder,
)
from cratelab.cli.options import Compare
from cratelab.cli.shared import new_recipe, prepare_corpus, print_table, report, use_one_thread
from cratelab.corpora.prepare import vocabulary_size
from cratelab.experiments.comparison import check_ladder, compare, loss_table
from cratelab.language_model import LanguageModelConfig
from cratelab.models import new_model
from cratelab.provenance import provenance
from cratelab.storage import write_json
from cratelab.terminal import is_main_process, say


def check(options: Compare) -> None:
    check_context(options.context, options.characters)
    check_folder("--out", options.out)


def run(options: Compare) -> None:
    check_ladder(options.presets, range(options.seeds))
    recipe = new_recipe(options, options.presets[0], seed=0)
    for preset in options.presets:  # what is out of range is said before the corpus is made
        new_model("crate", preset, vocabulary_size(options.corpus, options.tokenizer), 0, options.context)
    context = _preset_context(options.presets[0]) if options.context is None else options.context
    use_one_thread(max(LanguageModelConfig.preset(preset).width for preset in options.presets))
    corpus = prepare_corpus(options, recipe, context)
    runs = compare(corpus, recipe, options.out, options.presets, range(options.seeds), options.context, say, report)
    if not is_main_process():
        return
    table = loss_table(runs)
    write_json(options.out / "compare.json", {"provenance": provenance(), "runs": runs, "table": table})
    plots.save_comparison(runs, options.out / "compare.png", corpus.floor)
    print_table(table, corpus.floor)
    say(f"{options.out}/compare.png and compare.json hold it")


def _preset_context(preset: str) -> int:
    return LanguageModelConfig.preset(preset).context
