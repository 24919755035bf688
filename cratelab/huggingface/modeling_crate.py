"""CRATE for Hugging Face `transformers`: `AutoModelForCausalLM`, `generate`, `Trainer` and what builds on them.

The blocks are cratelab's own; here is what `transformers` asks of a model around them. Notable: query, key and value
are one tensor, so the cache keeps one a layer, and values of width 0; a layer's sparse codes pass through the identity
`model.blocks.i.neurons`, to hook; weights have cratelab's names, below `model.`.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from cratelab.crate_block import CrateBlock
from cratelab.ista import Ista
from cratelab.mssa import Mssa


class CrateConfig(PreTrainedConfig):
    """The fields of cratelab's `CrateConfig`, and those that `transformers` adds."""

    model_type = "crate"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012, as everywhere in transformers
        "hidden_size": "width",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "context",
    }

    n_layers: int = 12
    n_heads: int = 12
    width: int = 768
    vocab_size: int = 50_304
    context: int = 1024
    expansion: int = 4
    span: int | None = None
    step_size: float = 0.1
    lam: float = 0.1
    n_steps: int = 2
    ista_residual: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """Plain attention of (b, k, n, p) tensors: what it gives, (b, n, k, p), and the map (b, k, n, n)."""
    scores = scaling * query @ key.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return rearrange(weights @ value, "b k n p -> b n k p"), weights


class CrateAttention(Mssa):
    """MSSA with the cache, the masks and the attention functions of `transformers`."""

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__(config.width, config.n_heads)
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.output.initial_std = 0.02 / (2 * config.n_layers) ** 0.5  # read where weights start

    def forward(
        self, z: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """From tokens (b, n, d) what attention gives (b, n, d), and where it is plain also its map (b, k, n, n)."""
        w = rearrange(self.projection(z), "b n (k p) -> b k n p", k=self.n_heads)
        keys = w
        if past_key_values is not None:
            keys, _ = past_key_values.update(w, w[..., :0], self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, weights = attend(self, w, keys, keys, attention_mask, scaling=w.shape[-1] ** -0.5, **kwargs)
        return self.output(rearrange(attended, "b n k p -> b n (k p)")), weights


class CrateLayer(GradientCheckpointingLayer, CrateBlock):
    """One layer: (b, n, d) to (b, n, d)."""

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__(config)
        self.attention = CrateAttention(config, layer_idx)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """The layer as cratelab has it, with what `transformers` gives to attention."""
        attended, _ = self.attention(self.attention_norm(x), **kwargs)
        return self.sparsify(x + attended)


class CratePreTrainedModel(PreTrainedModel):
    """What the model has in common with and without its head."""

    config_class = CrateConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "token_embedding"
    _no_split_modules = ("CrateLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CrateLayer, "attentions": CrateAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights start as those of `cratelab.Crate`.

        Only modules that own parameters come here if the code is another's than transformers'; so the output matrix of
        MSSA says itself how it starts.
        """
        super()._init_weights(module)  # matrices and embeddings N(0, 0.02²), biases 0, LayerNorms 1 and 0
        if isinstance(module, Ista):
            init.kaiming_uniform_(module.weight)
        elif hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)


class CrateModel(CratePreTrainedModel):
    """Embeddings, blocks and the last norm: tokens (b, n) to (b, n, d)."""

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(CrateLayer(config, i) for i in range(config.n_layers))
        self.norm = nn.LayerNorm(config.width)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """One of `input_ids` (b, n) and `inputs_embeds` (b, n, d), which are without positions.

        Positions are counted by the mask, so that padding on the left makes no difference.

        Raises:
            ValueError: none or both are given, or the tokens reach past the context.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        n, seen = x.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
        if not torch.compiler.is_compiling() and seen + n > self.config.context:
            raise ValueError(
                f"the context is {self.config.context} tokens, since positions are learned; got {int(seen + n)}: "
                "crop the text to its last tokens, or generate fewer"
            )
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n:]
        elif position_ids is None:
            position_ids = (torch.arange(n, device=x.device) + seen)[None]
        span = self.config.span
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=None if span is None else lambda batch, head, query, key: query - key <= span,
        )
        x = x + self.position_embedding(position_ids)
        for block in self.blocks:
            x = block(x, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """CRATE with its head, which is the token embedding once more: tokens (b, n) to logits (b, n, v)."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.model = CrateModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `CrateModel`; with `labels` (b, n) the loss in nats a token, of each label given the tokens before it."""
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
