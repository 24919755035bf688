"""The model card: what an exported model is, how it is loaded, and where it comes from."""

import json

from cratelab.crate import Crate
from cratelab.language_model import LanguageModel
from cratelab.storage import finite

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{kind} of {layers} layers, width {width}, with {parameters:,} parameters and a context of {context} tokens.

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
```

{about}

## How it was made

{made}

## Licence

Unknown: nothing says under which terms the text that it was trained on may be used, and so its weights.{code}
"""

_ABOUT_CRATE = """\
CRATE (Bai & Ma 2024, arXiv:2410.16443) is a transformer whose every layer is modelled on a step up one objective, \
sparse rate reduction. The neurons of layer i, a sparse non-negative code of each token, pass through \
`model.blocks.i.neurons`: hook that module to record or to edit them. The code comes with this folder and needs \
PyTorch, einops and transformers 5.8 or newer."""
_ABOUT_GPT2 = "The neurons of layer i are what its `transformer.h.i.mlp.act` gives."
_LICENCE_OF_CODE = " The code is cratelab's, under the MIT licence."


def model_card(model: LanguageModel, name: str, run: dict, validation_loss: float | None = None) -> str:
    """The README.md of an exported model.

    Args:
        model: what is exported.
        name: of the folder.
        run: the run.json of the training; empty if the model comes from elsewhere.
        validation_loss: the last one, nats a token.
    """
    is_crate = isinstance(model, Crate)
    return _CARD.format(
        name=name,
        kind="CRATE, a language model" if is_crate else "GPT-2, a language model",
        layers=model.config.n_layers,
        width=model.config.width,
        context=model.config.context,
        parameters=model.count_parameters(),
        trust=", trust_remote_code=True" if is_crate else "",
        about=_ABOUT_CRATE if is_crate else _ABOUT_GPT2,
        made=_made(run, validation_loss) if run else "Nothing is known about its training.",
        code=_LICENCE_OF_CODE if is_crate else "",
    )


def _made(run: dict, validation_loss: float | None) -> str:
    command = run.get("command") if isinstance(run.get("command"), dict) else {}
    loss = "unknown" if validation_loss is None else f"{validation_loss:.3f} nats a token"
    kept = {part: run.get(part) for part in ("recipe", "tokenizer", "training", "validation", "provenance")}
    return (
        f"Text: `{command.get('corpus', 'unknown')}`. Loss on held-out text: {loss}. Numbers of tokens, hashes of text "
        "and code, versions and machine:\n\n"
        f"```json\n{json.dumps(finite(kept), indent=1, ensure_ascii=False)}\n```"
    )
