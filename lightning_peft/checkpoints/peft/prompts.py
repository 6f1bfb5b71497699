"""PromptTuning and PTuning: peft has the vectors, and of an encoder only what it has made."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints.peft.formats import PeftFormat, formats
from lightning_peft.checkpoints.peft.state import PROMPT, PeftFile, PeftState, sizes
from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.core.method import Method, Placement
from lightning_peft.methods.p_tuning import EncodedPrompt, PTuning
from lightning_peft.methods.prompt_tuning import Prompt, PromptTuning
from lightning_peft.prompting.prompts import PromptedCall

# Fields that are read, and fields that only say where the prompt came from.
_READ = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
)  # fmt: skip


@formats(PromptTuning)
class PromptFormat(PeftFormat):
    """The vectors of a prompt. What an encoder has made is read as one, since peft does not save the encoder."""

    types: tuple[str, ...] = ("PROMPT_TUNING", "P_TUNING")

    def to_peft(self, method: Any, placements: Sequence[Placement], model: Any) -> PeftState | None:
        prompts = [p.adapter.prompt for p in placements if isinstance(p.adapter, PromptedCall)]
        if len(prompts) != 1 or not isinstance(prompts[0], Prompt | EncodedPrompt):
            return None
        vectors = prompts[0].vectors()
        config = {
            "peft_type": self.table.type,
            "num_virtual_tokens": method.num_virtual_tokens,
            "token_dim": vectors.shape[1],
            **sizes(model),
            "num_transformer_submodules": 1,  # of an encoder-decoder model, the encoder alone
            **self.config(method, placements),
        }
        return PeftState(config=config, tensors={PROMPT: TensorView((vectors,))}, exact=isinstance(prompts[0], Prompt))

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        file.check_fields(*_READ)
        vectors, size = file.prompt()
        # For an encoder-decoder model peft makes a prompt for the decoder too, behind the encoder's, and never uses it.
        used = vectors[:size] if file.config.get("num_transformer_submodules") == 2 else vectors
        return PromptTuning(num_virtual_tokens=size, modules_to_save=None), {**file.tensors, PROMPT: used}


@formats(PTuning)
class EncodedPromptFormat(PromptFormat):
    """What the encoder makes, with its settings. Files of it are read as prompts."""

    types = ()

    def config(self, method: Any, placements: Sequence[Placement]) -> dict[str, Any]:
        prompt: Any = next(p.adapter.prompt for p in placements if isinstance(p.adapter, PromptedCall))
        return {
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.encoder_hidden_size or prompt.embedding.shape[1],
            "encoder_num_layers": method.encoder_num_layers,
            "encoder_dropout": method.encoder_dropout,
        }
