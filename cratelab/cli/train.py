"""`cratelab train`: one model."""

import re
from dataclasses import asdict
from pathlib import Path

from cratelab import plots
from cratelab.budget import estimate
from cratelab.cli.checks import (
    check_context,
    check_folder,
)
from cratelab.cli.options import Train, dashed
from cratelab.cli.runs import read_command, remembered
from cratelab.cli.shared import defined, new_recipe, prepare_corpus, report, use_one_thread
from cratelab.corpora.prepare import vocabulary_size
from cratelab.models import new_model
from cratelab.run_directory import check_same_run
from cratelab.terminal import is_main_process, say
from cratelab.training import train


def check(options: Train) -> None:
    given = [option for option, value in vars(options).items() if value != getattr(Train, option)]
    ignored = [dashed(option) for option in given if option not in ("resume", "dry_run", "device")]
    if options.resume and ignored:
        raise ValueError(f"--resume takes all options from the run: leave out {', '.join(ignored)}")
    check_context(options.context, options.characters)
    if not options.resume and not options.dry_run:
        check_folder("--run-dir", options.run_dir or Path("runs"))
    if options.run_dir and not options.dry_run:
        check_same_run(options.run_dir, {})


def run(options: Train) -> None:
    command, run_dir = options, options.run_dir
    if options.resume:
        command, run_dir = read_command(options.resume), options.resume
    recipe = new_recipe(command, command.preset, command.seed)
    n_vocab = vocabulary_size(command.corpus, command.tokenizer)
    model = new_model(command.model, command.preset, n_vocab, command.seed, command.context)
    if options.dry_run:
        say(str(estimate(type(model), model.config, recipe)))
        return
    name = re.sub(r'[<>:"/\\|?*]', "_", command.corpus)  # none of which Windows allows in a name
    run_dir = run_dir or Path("runs") / f"{command.model}-{command.preset}-{name}-{command.seed}"
    check_same_run(run_dir, {"model": {"model": model.kind, **asdict(model.config)}, "recipe": asdict(recipe)})
    corpus = prepare_corpus(command, recipe, model.config.context)
    use_one_thread(model.config.width)
    say(f"{command.model} {command.preset}, {model.count_parameters():,} parameters, into {run_dir}")
    if (run_dir / "model/config.json").is_file():
        say(
            f"its {recipe.steps} steps are done, and {run_dir / 'model'} holds the model; to train longer, begin "
            "another run, with more --steps and another --run-dir"
        )
    kept = remembered(command)
    metrics = train(model, corpus.training, corpus.validation, recipe, run_dir, report, kept, corpus.tokenizer)
    if not is_main_process():
        return
    plots.save_loss_curve(metrics, run_dir / "loss.png", corpus.floor)
    floor = f"; the floor is {corpus.floor:.3f}" if corpus.floor else ""
    say(f"validation loss {defined(metrics[-1]['validation_loss'], 3)} nats a token{floor}")
    say(f"{run_dir}/loss.png shows it; cratelab.load('{run_dir}/model') is the model")
