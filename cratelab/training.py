"""Training: a loop to read in one sitting, for any model of the trunk, on one CPU or many GPUs (chapter 7).

Hugging Face Accelerate supplies devices, mixed precision, gradient accumulation and processes: start the same script
by `accelerate launch` and it is distributed. Each step draws its windows from `[seed, step]` and the models have no
dropout, so nothing random has a state, and a run that was killed goes on to the same weights, bit for bit on one CPU.
"""

import copy
import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

with warnings.catch_warnings():  # in notebooks it asks for widgets, which our progress bars do without
    warnings.filterwarnings("ignore", message="IProgress not found")
    from accelerate import Accelerator
    from accelerate.state import is_initialized
    from accelerate.utils import GradientAccumulationPlugin

from cratelab.corpora.token_store import TokenizedCorpus
from cratelab.corpora.tokenizers import Tokenizer, fingerprint
from cratelab.devices import best_device, leave_group_at_exit
from cratelab.language_model import LanguageModel
from cratelab.losses import Diverged, next_token_loss, validation_loss
from cratelab.reading import check_vocabulary
from cratelab.recipe import Recipe
from cratelab.run_directory import RunDirectory


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: LanguageModel,
    training: TokenizedCorpus,
    validation: TokenizedCorpus,
    recipe: Recipe,
    run_dir: str | Path | None = None,
    on_step: Callable[[dict], None] | None = None,
    command: dict | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[dict]:
    """Train `model` in place by AdamW (eq-07-3). With a `run_dir` the same call goes on where a killed one stopped.

    What compiles the model, lowers its precision or spreads it over processes is put around a second object of the same
    weights. So `model` is afterwards, however the call ends, what it was, with other weights and without gradients.

    Args:
        model: CRATE or GPT-2, with the weights to start from. It is moved to the device that Accelerate chooses.
        training: windows of context + 1 tokens are drawn from anywhere in it.
        validation: scored on fixed windows.
        recipe: how.
        run_dir: folder for `run.json`, `metrics.jsonl`, the latest checkpoints and, in the end, `model`, to be read by
            `cratelab.load`; see `RunDirectory`. Without one, nothing is written.
        on_step: called with the metrics of each step, in the main process.
        command: kept in `run.json`, for a caller that has to build model and corpora again.
        tokenizer: what made the corpora; kept in `run_dir`.

    Returns:
        One dict a step, with step (from 1), loss and gradient_norm before its update, learning_rate, tokens so far,
        seconds of the step, and where there was a validation, validation_loss after the update. Losses in nats a token.
        gradient_norm is None where float16, which only `accelerate launch` asks for, overflowed: nothing was updated.

    Raises:
        ValueError: model, corpora and recipe do not fit one another, `run_dir` holds another run or is damaged, or
            the call is within `torch.autocast`.
        Diverged: the loss is lost; the latest checkpoint is from before.
        BlockingIOError: another process trains in `run_dir`.
        OSError: a file cannot be written, such as on a full disk; the latest checkpoint is whole.
    """
    _check_model(model)
    _check_corpora(model, training, validation, tokenizer)
    precision = _precision(recipe)
    accelerator = Accelerator(
        cpu=best_device().type == "cpu",  # else several processes on a machine without a GPU would not know each other
        mixed_precision=None if is_initialized() else precision,  # a process has one for good: it is ours that counts
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.accumulate),
    )
    leave_group_at_exit()
    recipe.check_division(accelerator.num_processes)
    if torch.is_autocast_enabled(accelerator.device.type):  # it would also keep old weights in its cache
        raise ValueError("train is called within torch.autocast: call it outside, with the precision in its recipe")
    length = model.config.context + 1
    n_windows = min(recipe.validation_windows, len(validation) // length)
    held_out = torch.from_numpy(validation.validation_windows(length, n_windows))
    arguments = model, recipe, training, validation, accelerator, command, tokenizer
    with RunDirectory.open(run_dir, *arguments) if run_dir else nullcontext() as run:
        model.zero_grad()  # of whatever was done with it before
        try:
            twin = _twin(model, recipe, precision, accelerator)
            trained, optimizer = accelerator.prepare(twin, _optimizer(model, recipe))
            metrics = run.resume(trained, optimizer) if run else []
            _Loop(trained, optimizer, training, held_out, recipe, accelerator, metrics, run).run(on_step)
            if run:
                run.finish(trained)
        finally:
            model.zero_grad()
    return metrics


def _twin(model: LanguageModel, recipe: Recipe, precision: str, accelerator: Accelerator) -> nn.Module:
    """A second object of the same parts and parameters, to be compiled and wrapped."""
    twin = copy.copy(model)
    dtype = {"no": None, "fp16": torch.float16}.get(precision, torch.bfloat16)
    twin.forward = torch.autocast(accelerator.device.type, dtype, enabled=precision != "no")(model.forward)
    if recipe.compile or (recipe.compile is None and accelerator.device.type == "cuda"):
        twin.compile()
    return twin


@dataclass
class _Loop:
    """What every step needs; `metrics` holds the rows of those that are done.

    Attributes:
        model: what is called and trained: compiled, wrapped, in mixed precision.
        held_out: (w, n + 1) windows to validate on.
    """

    model: nn.Module
    optimizer: Optimizer
    training: TokenizedCorpus
    held_out: Tensor
    recipe: Recipe
    accelerator: Accelerator
    metrics: list[dict]
    directory: RunDirectory | None

    def run(self, on_step: Callable[[dict], None] | None) -> None:
        """The steps that are left."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        with tqdm(total=recipe.steps, initial=len(self.metrics), unit="step", disable=None if main else True) as bar:
            for step in range(len(self.metrics) + 1, recipe.steps + 1):
                start, last = time.perf_counter(), step == recipe.steps
                row = self.update(step)
                if last or step % recipe.validate_every == 0:
                    row["validation_loss"] = self.validate(step)
                to_keep = last or step % recipe.checkpoint_every == 0
                if to_keep:
                    self.check_state(step)
                row["seconds"] = time.perf_counter() - start
                self.metrics.append(row)
                if self.directory:
                    self.directory.write_metrics(row)
                    if to_keep:
                        self.directory.save_checkpoint(step, self.model, self.optimizer)
                if on_step and main:
                    on_step(row)
                speed = row["tokens"] / step / row["seconds"]
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s")
                bar.update()

    def update(self, step: int) -> dict:
        """One update of the weights, on this process's share of the step's windows; its row of the metrics."""
        recipe, accelerator, length = self.recipe, self.accelerator, self.held_out.shape[1]
        rate = recipe.learning_rate(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        windows = torch.from_numpy(self.training.random_windows(recipe.batch, length, [recipe.seed, step - 1]))
        losses = []
        for part in self.share(windows).chunk(recipe.accumulate):
            with accelerator.accumulate(self.model):
                loss = next_token_loss(self.model, part)
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:  # after the last part
                    norm = float(accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip))
                    mean_loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
                    # float16's scaler skips an update whose gradient overflows, and takes a smaller scale for the next
                    if accelerator.scaler is not None and not math.isfinite(norm):
                        norm = None
                    self.check_progress(step, mean_loss, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        tokens = step * recipe.batch * (length - 1)
        return dict(step=step, loss=mean_loss, gradient_norm=norm, learning_rate=rate, tokens=tokens)

    def share(self, windows: Tensor) -> Tensor:
        """Those of the windows that are this process's, on its device."""
        return windows[self.accelerator.process_index :: self.accelerator.num_processes].to(self.accelerator.device)

    def validate(self, step: int) -> float:
        """`validation_loss`, each process on its share of the windows."""
        accelerator, mine = self.accelerator, self.share(self.held_out)
        batch = max(1, self.recipe.batch // (accelerator.num_processes * self.recipe.accumulate))
        total = validation_loss(self.model, mine, batch) * len(mine) if len(mine) else 0.0
        loss = float(accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum")) / len(self.held_out)
        if not math.isfinite(loss):
            raise self.diverged(step, f"the validation loss after it is {loss}")
        return loss

    def check_progress(self, step: int, loss: float, norm: float | None) -> None:
        """Raises Diverged if the step has no finite gradient, or the last 20 are worse than the untrained model."""
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            raise self.diverged(step, f"the loss is {loss}, the norm of its gradient {norm}")
        recent = [row["loss"] for row in self.metrics[-19:]] + [loss]
        if len(recent) == 20 and not sum(recent) / 20 < self.metrics[0]["loss"] + 1:
            what = f"the mean loss of the last 20 steps is {sum(recent) / 20:.3g}, the untrained model's was "
            raise self.diverged(step, what + f"{self.metrics[0]['loss']:.3g}")

    def check_state(self, step: int) -> None:
        """Raises Diverged unless all weights and AdamW's averages are finite, on all processes."""
        averages = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        held = [*self.model.parameters(), *averages]
        mine = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
        n_wrong = float(sum(not tensor.detach().isfinite().all() for tensor in mine))
        if self.accelerator.reduce(torch.tensor(n_wrong, device=self.accelerator.device), "sum"):
            raise self.diverged(step, "a weight, or an average of AdamW's, is no finite number after it")

    def diverged(self, step: int, what: str) -> Diverged:
        run = self.directory
        kept = f"; {run.checkpoint_path()} is from before" if run and run.latest_step() else ""
        return Diverged(f"step {step}: {what}{kept}. A lower peak_rate or a longer warmup often helps")


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [dict(params=matrices, weight_decay=recipe.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)


def _precision(recipe: Recipe) -> str:
    """The recipe's, or what `accelerate launch` was told, or what the device can do."""
    if recipe.precision != "auto":
        return recipe.precision
    able = best_device().type == "cuda" and torch.cuda.is_bf16_supported()
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "bf16" if able else "no").lower()


def _check_model(model: LanguageModel) -> None:
    if not isinstance(model, LanguageModel):
        raise ValueError(f"train needs a model such as Crate, itself and not wrapped; got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    halves = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        raise ValueError(
            f"weights of {halves.pop()} are too coarse for AdamW's updates: train model.float(), and let the recipe's "
            'precision="bf16" lower the precision of the products'
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model was made under torch.inference_mode, which allows no gradient: make it outside")
    wrong = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"the model holds numbers that are not finite, in {', '.join(wrong[:5])}")


def _check_corpora(
    model: LanguageModel, training: TokenizedCorpus, validation: TokenizedCorpus, tokenizer: Tokenizer | None
) -> None:
    config = model.config
    for name, corpus in ("training", training), ("validation", validation):
        check_vocabulary(model, corpus, f"{name} corpus")
        if len(corpus) <= config.context:
            raise ValueError(
                f"the {name} corpus has {len(corpus)} tokens, fewer than the context and one more "
                f"({config.context + 1}): take more text, or a model with a shorter context"
            )
        if tokenizer and corpus.n_vocab > tokenizer.n_vocab:
            raise ValueError(f"the {name} corpus has {corpus.n_vocab} tokens, its tokenizer {tokenizer.n_vocab}")
    made_by = [corpus.manifest.get("tokenizer", {}).get("sha256") for corpus in (training, validation)]
    made_by.append(tokenizer and fingerprint(tokenizer))
    if len({each for each in made_by if each}) > 1:
        raise ValueError(
            "training and validation corpus and the tokenizer do not belong together; their tokenizers' sha256 are "
            + ", ".join(each[:12] + "…" if each else "unknown" for each in made_by)
        )
