"""A server on this machine that speaks OpenAI's API, a random language model, and what they are asked about."""

import json
import math
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from einops import rearrange

from cratelab.interpret.asking.endpoints import OpenAIEndpoint
from cratelab.interpret.asking.local_endpoint import HuggingFaceEndpoint
from cratelab.interpret.asking.prompts import as_question
from cratelab.interpret.excerpts import Excerpts
from cratelab.reading import NO_TOKEN

WORDS = ["sun", " cat", " sat", "a\tb", "x\ny", "unknown", "<|endoftext|>", "\ud800", "\\n", "�", "10", " <b>", ""]


class Words:
    """A tokenizer of hostile words."""

    def decode(self, tokens):
        return "".join(WORDS[token] for token in tokens)


class Api(ThreadingHTTPServer):
    """A server on this machine. `reply(path, body, n)` gives (status, headers, JSON or bytes) of the n-th request."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.path, json.loads(body or "null"), dict(self.headers)))
            n = len(self.server.requests)
        status, headers, content = self.server.reply(self.path, json.loads(body or "null"), n)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = "Content-Length" in headers  # a lie about the length is a cut connection

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture
def on_the_cpu():  # where records are, whatever the tests' default device
    with torch.device("cpu"):
        yield


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Api(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(monkeypatch):
    httpx2 = pytest.importorskip("httpx2", reason="the extra `interpret` is not installed")
    # without the system's certificates, which no server here needs and every client takes 0.1 s to read
    monkeypatch.setattr(httpx2, "AsyncClient", partial(httpx2.AsyncClient, verify=False))
    opened = []

    def connect(server, model="tiny", **options):
        options = {"backoff": 0.001, "echo": False} | options
        opened.append(OpenAIEndpoint(getattr(server, "url", server), model, **options))
        return opened[-1]

    yield connect
    for endpoint in opened:
        endpoint.close()


def next_token(probabilities, path="/v1/completions", modern=False):
    """The API's JSON for the likeliest next tokens."""
    logs = {token: math.log(p) for token, p in probabilities.items()}
    best = max(logs, key=logs.get)
    entries = {"token": best, "logprob": logs[best], "bytes": None}
    entries["top_logprobs"] = [{"token": token, "logprob": p, "bytes": None} for token, p in logs.items()]
    old = {"tokens": [best], "token_logprobs": [logs[best]], "top_logprobs": [logs], "text_offset": [0]}
    choice = {"index": 0, "finish_reason": "length"}
    choice["logprobs"] = {"content": [entries]} if "chat" in path or modern else old
    choice |= {"message": {"role": "assistant", "content": best}} if "chat" in path else {"text": best}
    return {"id": "1", "object": "completion", "choices": [choice], "usage": {"prompt_tokens": 1}}


def written(text, path="/v1/chat/completions"):
    choice = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
    return {"choices": [{"index": 0, **choice, "finish_reason": "stop"}]}


def prompt_of(body):
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def last_token(body):
    return prompt_of(body).removesuffix(as_question("")).rpartition("\n")[2].removesuffix("\t")


HIGH, LOW = {" 7": 0.6, "8": 0.2, " the": 0.2}, {"0": 0.5, "1": 0.25, "unknown": 0.25}

EXPECTED = {True: (7 * 0.6 + 8 * 0.2) / 0.8, False: 0.25 / 0.75}


def understanding(path, body, n):
    """Active on tokens with an a."""
    return 200, {}, next_token(HIGH if "a" in last_token(body) else LOW, path)


def excerpts_of(tokens, activations=None):
    """One layer with as many neurons as there are lists of texts."""
    tokens = torch.tensor(tokens, dtype=torch.int32)
    activations = torch.zeros(tokens.shape) if activations is None else torch.tensor(activations)
    starts = torch.zeros(tokens.shape[:2], dtype=torch.long)
    return Excerpts(*(value[None] for value in (tokens, activations, starts, starts)))


TEXT = excerpts_of([[[0, 1, 2], [2, 0, NO_TOKEN]], [[0, 0, 1], [NO_TOKEN] * 3]])


def quiet(cost):
    pass


def foretold(simulator, texts, excerpts=TEXT):
    """Of as many of the first neurons as there are texts."""
    return simulator.simulate(texts, excerpts.neurons(0, list(range(len(texts)))), Words())[0]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Llama over bytes, with a token of its own for a tab and the u after it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tab = tokenizers.pre_tokenizers.ByteLevel(False).pre_tokenize_str("\t")[0][0]
    words = {character: i for i, character in enumerate([*alphabet, tab + "u"])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(words, [(tab, "u")]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for m in messages %}[[{{ m['content'] }}]]{% endfor %}"
    config = transformers.LlamaConfig(
        **dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2),
        **dict(num_attention_heads=2, max_position_embeddings=1500, bos_token_id=None, eos_token_id=257),
        initializer_range=0.5,
    )
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def packed(folder, tmp_path_factory):
    """The same model as a GGUF file, with q and k in pairs of neighbours, as llama.cpp rotates them.

    What is read from it splits a text at tabs, so that all tokens are bytes.
    """
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(folder), model.config
    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokenizer) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(
        [" ".join(merge) for merge in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]
    )
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = "(head half pair) d -> (head pair half) d"
            tensor = rearrange(tensor, halves, head=config.num_attention_heads, half=2)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def local(folder):
    return HuggingFaceEndpoint(folder, device="cpu")
