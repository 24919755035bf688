"""Language models that answer requests on this machine, from a Hugging Face folder."""

import json
import math
from pathlib import Path

import torch

from cratelab.arguments import check_seed
from cratelab.devices import best_device
from cratelab.extras import require
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.replies import Answer, text_or_problem
from cratelab.storage import digest_of, digest_of_file, read_json, tensor_shapes

DECIDES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # kinds of files that what a model says depends on


class HuggingFaceEndpoint:
    """A causal language model on this machine: no network, safetensors only, no code but that of `transformers`.

    The next tokens after all pieces of a prompt are read in one forward pass. Pieces are tokenised one by one, so that
    a token ends where a piece does.

    Args:
        path: folder with config.json, a tokenizer and weights as .safetensors.
        chat: put prompts that ask for text into the model's chat template.
        device: best_device() unless given.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder.
        ValueError: it holds no model that can be loaded so, or its weights lack some of what config.json promises.
    """

    concurrency, all_at_once, continues = 1, True, True

    def __init__(self, path: str | Path, chat: bool = False, device: torch.device | str | None = None):
        self.path, self.chat, self.device = Path(path), chat, torch.device(device or best_device())
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"no folder {self.path}: download a model with `hf download MODEL --local-dir FOLDER`"
            )
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.path} holds no *.safetensors, and nothing is ever unpickled: convert the weights")
        transformers = require("transformers", "interpret")
        only_local = dict(local_files_only=True, trust_remote_code=False)
        try:
            _check_size(self.path, files)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, **only_local)
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                self.path, use_safetensors=True, dtype="auto", output_loading_info=True, **only_local
            )
        except Exception as error:  # of many kinds, and all about the folder
            raise ValueError(f"{self.path} is no causal language model that transformers loads: {error}") from error
        if lacking := sorted(loaded["missing_keys"]):
            raise ValueError(f"the weights in {self.path} lack {len(lacking)} tensors, such as {lacking[0]}")
        self.model = model.to(self.device).eval()
        deciding = [file for file in self.path.iterdir() if file.suffix in DECIDES and file.is_file()]
        digest = digest_of({file.name: digest_of_file(file) for file in deciding})
        self.name = json.dumps([str(self.path.resolve()), digest, chat, str(self.model.dtype)])

    @torch.no_grad()
    def answer(self, request: Request) -> Answer:
        """Read or write.

        Raises:
            ValueError: the prompt is empty, or with its answer longer than the model's context.
        """
        ids, ends = self._encode(request)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context and len(ids) + request.max_tokens - 1 > context:
            raise ValueError(
                f"the prompt is {len(ids)} tokens, the context of {self.path.name} {context}: "
                "take fewer or shorter excerpts"
            )
        if -1 in ends:
            raise ValueError("the prompt has no token that something could follow")
        tokens = torch.tensor([ids], device=self.device)
        if not request.top:
            try:
                return text_or_problem(self._write(tokens, request))
            except RuntimeError as error:  # as of probabilities that are NaN
                return {"problem": f"the model cannot write: {error}"}
        logits = self.model(tokens).logits[0, ends].float()
        best = logits.log_softmax(-1).topk(min(request.top, logits.shape[-1]))
        return {
            "next": [
                [[self.tokenizer.decode([token]), value] for token, value in zip(*pair, strict=True)]
                for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        }

    def count_tokens(self, text: str) -> int:
        """Exact but for the chat template."""
        return len(self.tokenizer(text)["input_ids"])

    def _encode(self, request: Request) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and the place of each piece's last."""
        if self.chat and not request.top:
            messages = [{"role": "user", "content": request.text}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, [len(ids) - 1]
        ids, ends = [], []
        for i, piece in enumerate(request.prompt):
            ids += self.tokenizer(piece, add_special_tokens=i == 0)["input_ids"]
            ends.append(len(ids) - 1)
        return ids, ends

    def _write(self, tokens: torch.Tensor, request: Request) -> str:
        sampling = dict(do_sample=True, temperature=request.temperature, top_k=0, top_p=1.0)
        end = self.tokenizer.pad_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        with torch.random.fork_rng():
            if request.seed is not None:
                check_seed(request.seed)
                torch.manual_seed(int(request.seed))
            written = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=request.max_tokens,
                pad_token_id=end,
                **(sampling if request.temperature > 0 else dict(do_sample=False)),
            )
        return self.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def _check_size(path: Path, files: list[Path]) -> None:
    """Raises ValueError if a size is above what all weights hold: transformers makes room before it reads any."""
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    most = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), len(shapes))
    most |= dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "n_positions"), sum(map(math.prod, shapes)))
    for name, value in read_json(path / "config.json").items():
        if type(value) is int and value > most.get(name, math.inf):
            raise ValueError(f"{path} promises more than its weights hold: {name}={value}")
