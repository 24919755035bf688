"""Language models that answer requests on this machine, from a Hugging Face folder or a GGUF file."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cratelab.arguments import check_seed
from cratelab.devices import best_device
from cratelab.extras import require
from cratelab.interpret.asking.endpoints import Request
from cratelab.interpret.asking.replies import Answer, number_in, only_numbers, text_or_problem
from cratelab.storage import digest_of, digest_of_file, read_json, tensor_shapes

DECIDES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # kinds of files that what a model says depends on


class HuggingFaceEndpoint:
    """A causal language model on this machine: no network, nothing unpickled, no code but that of `transformers`.

    How likely each number is after every piece of a prompt is read in one forward pass, from the logits of all tokens
    that are one. Pieces are tokenised one by one, so that a token ends where a piece does.

    Args:
        path: folder with config.json, a tokenizer and weights as .safetensors; or a GGUF file, whose weights are
            unpacked as they are loaded. Nothing else in its folder is read.
        chat: put prompts that ask for text into the model's chat template.
        device: best_device() unless given.

    Raises:
        ImportError: transformers is not installed, or gguf where it is needed.
        FileNotFoundError: there is no such folder or file.
        ValueError: it holds no model that can be loaded so, or its weights lack some of what config.json promises.
    """

    concurrency, all_at_once, continues = 1, True, True

    def __init__(self, path: str | Path, chat: bool = False, device: torch.device | str | None = None):
        self.path, self.chat, self.device = Path(path), chat, torch.device(device or best_device())
        is_gguf = is_gguf_file(self.path)
        if not is_gguf and not self.path.is_dir():
            raise FileNotFoundError(
                f"no folder or .gguf file {self.path}: download a model with `hf download MODEL --local-dir FOLDER`"
            )
        if not is_gguf and not any(self.path.glob("*.safetensors")):
            raise ValueError(f"{self.path} holds no *.safetensors, and nothing is ever unpickled: convert the weights")
        transformers = require("transformers", "interpret")
        if is_gguf:
            require("gguf", "interpret")
        try:
            load = self._load_gguf if is_gguf else self._load_folder
            self.tokenizer, (model, loaded) = load(transformers, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds, and all about the folder or file
            raise ValueError(f"{self.path} is no causal language model that transformers loads: {error}") from error
        if lacking := sorted(loaded["missing_keys"]):
            raise ValueError(f"the weights in {self.path} lack {len(lacking)} tensors, such as {lacking[0]}")
        self.model = model.to(self.device).eval()
        spelled = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self._numbers = {token: text for token, text in enumerate(spelled) if number_in(text) is not None}
        if not self._numbers:
            raise ValueError(
                f"{self.path} has no token that is a number from 0 to 10, which activations are written as"
            )
        deciding = [file for file in self.path.iterdir() if file.suffix in DECIDES] if not is_gguf else [self.path]
        digest = digest_of({file.name: digest_of_file(file) for file in deciding if file.is_file()})
        self.name = json.dumps([str(self.path.resolve()), digest, chat, str(self.model.dtype), "all numbers"])

    def _load_folder(self, transformers, **settings):
        shapes = [shape for file in self.path.glob("*.safetensors") for shape in tensor_shapes(file).values()]
        _check_size(self.path, read_json(self.path / "config.json"), shapes)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, **settings)
        settings |= dict(use_safetensors=True, dtype="auto", output_loading_info=True)
        return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(self.path, **settings)

    def _load_gguf(self, transformers, **settings):
        from gguf import GGUFReader

        with TemporaryDirectory() as empty:  # where transformers would look for settings beside the file's own
            settings |= dict(pretrained_model_name_or_path=empty, gguf_file=str(self.path.resolve()))
            config = transformers.AutoConfig.from_pretrained(**settings).to_dict()
            _check_size(self.path, config, [tensor.shape.tolist() for tensor in GGUFReader(self.path).tensors])
            tokenizer = transformers.AutoTokenizer.from_pretrained(**settings)
            if unpacked := getattr(transformers, "GgufConfig", None):  # else it may fetch kernels from the hub
                settings["quantization_config"] = unpacked(dequantize=True)
            settings |= dict(dtype="auto", output_loading_info=True)
            return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(**settings)

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
        logs = self.model(tokens).logits[0, ends].float().log_softmax(-1)[:, list(self._numbers)]
        return {"next": [only_numbers(zip(self._numbers.values(), row, strict=True)) for row in logs.tolist()]}

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


def is_gguf_file(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".gguf" and Path(path).is_file()


def _check_size(path: Path, config: dict, shapes: list[Iterable[int]]) -> None:
    """Raises ValueError if a size is above what all weights hold: transformers makes room before it reads any."""
    most = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), len(shapes))
    most |= dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "n_positions"), sum(map(math.prod, shapes)))
    for name, value in config.items():
        if type(value) is int and value > most.get(name, math.inf):
            raise ValueError(f"{path} promises more than its weights hold: {name}={value}")
