"""PrefixTuning: peft has the keys and values of all layers side by side, in one matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.checkpoints.peft.formats import PeftFormat, formats
from lightning_peft.checkpoints.peft.state import PROMPT, PeftFile, PeftState, sizes
from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.core.method import Method, Placement
from lightning_peft.errors import BaseMismatchError
from lightning_peft.methods.prefix_tuning import Prefix, PrefixTuning, attends_across
from lightning_peft.network.blocks import find_blocks
from lightning_peft.network.hosts import find_hosts
from lightning_peft.prompting.attention import PrefixedAttention

# Fields that are read, and fields that only say where the prefix came from.
_READ = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "prefix_projection", "encoder_hidden_size", "init_weights",
)  # fmt: skip


@formats(PrefixTuning)
class PrefixFormat(PeftFormat):
    """One prefix in every layer, and of an encoder-decoder model in the decoder's attention to itself."""

    def to_peft(self, method: Any, placements: Sequence[Placement], model: Any) -> PeftState | None:
        blocks = find_blocks(list(find_hosts(model)))
        adapters = [p.adapter for p in placements if isinstance(p.adapter, PrefixedAttention)]
        prefixes = [adapter.prefix for adapter in adapters if isinstance(adapter.prefix, Prefix)]
        pairs = [prefix.flat() for prefix in prefixes]
        widths = {keys.shape[-1] for keys, _ in pairs}
        partial = method.exclude_modules is not None or method.layers is not None
        crosses = attends_across(blocks)
        if method.gating or partial or len(widths) != 1 or (crosses and {*method.places} != {"decoder"}):
            return None
        order = _order(len(pairs), crosses)
        spare = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
        parts = [part for layer in order for part in (pairs[layer] if layer < len(pairs) else spare)]
        config = {
            "peft_type": self.table.type,
            "num_virtual_tokens": method.num_virtual_tokens,
            "token_dim": widths.pop(),
            **sizes(model),
            "num_layers": len(order),
            "num_transformer_submodules": 2 if crosses else 1,
            "prefix_projection": False,  # the saved prefix has no MLP any more, and can be trained on as it is
        }
        tensor = TensorView(tuple(part.detach() for part in parts), dim=1)
        return PeftState(config=config, tensors={PROMPT: tensor}, exact=not method.prefix_projection)

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        file.check_fields(*_READ)
        flat, size = file.prompt()
        method = PrefixTuning(num_virtual_tokens=size, places=["decoder"], modules_to_save=None)
        blocks = find_blocks(list(find_hosts(file.model)))
        count, layers, crosses = len(method.attentions(blocks)), file.whole("num_layers"), attends_across(blocks)
        if layers < max(count, 1) or flat.shape[1] % (2 * layers) or (layers != count and not crosses):
            raise BaseMismatchError(
                f"The adapter belongs to another base: its prefix is {list(flat.shape)} for {layers} layers, and "
                f"{type(file.model).__name__} has {count}. Load the base model that the adapter was trained on."
            )
        pairs = [*flat.chunk(layers, 1)]
        if file.config.get("num_transformer_submodules", 2 if crosses else 1) == 2:
            # peft cuts this as if each layer had two pairs: layer l gets pair 2l, beginning again at the end.
            pairs = [pairs[2 * layer % layers] for layer in range(count)]
        pairs.append(torch.zeros_like(pairs[0]))
        return method, {**file.tensors, PROMPT: torch.cat([pairs[i] for i in _order(count, crosses)], 1)}


def _order(layers: int, crosses: bool) -> list[int]:
    """Which layer's pair of keys and values stands where in peft's flat prefix; ``layers`` for one that none reads.

    Of N pairs, layer l of an encoder-decoder model is given pair 2l, beginning again at the end. With an odd N, each
    has its own.
    """
    if not crosses:
        return list(range(layers))
    pairs = layers | 1
    order = [layers] * pairs
    for layer in range(layers):
        order[2 * layer % pairs] = layer
    return order
