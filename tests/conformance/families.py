"""Every family of causal language models that transformers has, as a tiny random model.

A family's default config is shrunk by the names that configs have for sizes, so the families of a new release are there
without a line here.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from generating import cache_name
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_peft import inject
from lightning_peft.core.method import Method

EXACT = 1e-4  # relative error below which two computations agree
_LARGEST = 20_000_000  # parameters; a larger model has sizes under names that are not known here
_NAMES = {
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions max_source_positions mamba_d_ssm",
    48: "intermediate_size intermediate_size_mlp ffn_dim dim_ff dff d_ff d_inner decoder_ffn_dim encoder_ffn_dim "
    "ffn_hidden_size",
    32: "hidden_size n_embd d_model emb_dim word_embed_proj_dim embed_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size mamba_head_dim mamba_d_head",
    8: "head_dim swa_head_dim d_kv v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input mamba_d_state state_size ssm_state_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "qk_rope_head_dim rotary_dim num_experts num_local_experts n_routed_experts mamba_n_heads linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads swa_num_key_value_heads o_groups num_experts_per_tok num_experts_per_token moe_topk "
    "zero_expert_num linear_num_key_heads num_codebooks",
    1: "n_shared_experts n_group topk_group num_expert_group n_groups bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
_SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
_SIZES |= {"is_decoder": True, "use_cache": True}
_OTHERWISE = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": None}]  # one after the other
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "decoder_layers")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SPECIAL: dict[str, dict[str, Any]] = {  # what no name says
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dory": {
        "num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "dots3_note_text": {
        "swa_head_dim": 12, "swa_num_attention_heads": 4, "swa_qk_nope_head_dim": 8, "swa_kv_lora_rank": 8,
        "swa_num_key_value_heads": 4,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal": {"audio_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 4,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    }},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # what the defaults hide behind thousands of tokens, or a layer
    "ministral3-scaled": ("ministral3", {"rope_parameters": _YARN}),
    "llama4_text-scaled": ("llama4_text", {"no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.5}),
    "recurrent_gemma-attention": ("recurrent_gemma", {"block_types": ["attention"]}),
}
FAMILIES = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
FAMILIES += [name for name, (family, _) in _VARIANTS.items() if family in FAMILIES]


class NotTinyError(Exception):
    """A family of which there is no tiny model that reads a text."""


@dataclass(frozen=True)
class Tiny:
    """A tiny model in eval mode."""

    model: Any = field(repr=False)
    source: dict[str, Tensor] = field(default_factory=dict)
    """What an encoder reads, where the model has one."""
    rows: int = 1
    """Tokens at one place of the text: more than 1 for codebooks."""

    @torch.no_grad()
    def __call__(self, ids: Tensor, **call: Any) -> Any:
        name = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        return self.model(**{**self.source, name: ids}, **call)

    def tokens(self, length: int) -> Tensor:
        """A text, (rows, length)."""
        return torch.randint(5, 50, (self.rows, length), generator=torch.Generator().manual_seed(3))

    def takes_positions(self) -> bool:
        """True if the caller can number the tokens."""
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def adapted(self, method: Method) -> "Tiny":
        """A copy with an adapter."""
        model = copy.deepcopy(self.model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            inject(model, method)
        return Tiny(model, self.source, self.rows)

    def cached(self, ids: Tensor, **call: Any) -> list[tuple[Tensor, Tensor] | None]:
        """What each layer caches: keys and values, (1, heads, tokens, features); None for a state."""
        name = cache_name(self.model)
        cache = getattr(self(ids, **call), name, None)
        if cache is None:  # RecurrentGemma puts none out, and keeps its states in its modules unless told not to
            cache = DynamicCache(config=self.model.config)
            self(ids, use_cache=False, **{name: cache}, **call)
        layers = getattr(cache, "self_attention_cache", cache).layers
        return [None if getattr(x, "keys", None) is None else (x.keys, x.values) for x in layers]


def build(family: str) -> Tiny:
    """The tiny model of an entry of :data:`FAMILIES`.

    Raises:
        NotTinyError: its default config does not become a small model that reads a text.
    """
    name, changes = _VARIANTS.get(family, (family, {}))
    return make(AutoModelForCausalLM.from_config, name, **changes)


def make(of: Callable[..., Any], family: str, source: Any = None, rows: int = 1, **changes: Any) -> Tiny:
    """The tiny model that ``of`` makes of a family's config, which differs from the default in ``changes``, too.

    Raises:
        NotTinyError: as for :func:`build`.
    """
    reasons: dict[str, None] = {}
    for otherwise in _OTHERWISE:
        for attention in ("sdpa", "eager"):
            try:
                config = _shrunk(CONFIG_MAPPING[family], _SIZES | otherwise, _SPECIAL.get(family, {}) | changes)
                tiny = Tiny(_model(of, config, attention), source or {}, rows)
                seen = [tiny(tiny.tokens(6)[:, :length]).logits[..., :3, :] for length in (3, 6)]
            except Exception as reason:
                reasons[f"{type(reason).__name__}: {' '.join(str(reason).split())[:150]}"] = None
            else:
                # Torch's kernel lets UMT5 and Doge look ahead in transformers 5.17.
                if attention == "eager" or error(*seen) < EXACT:
                    return tiny
    raise NotTinyError(f"{family}: {'; '.join(reasons)}")


def _shrunk(kind: Any, sizes: dict[str, Any], special: dict[str, Any]) -> Any:
    """A config of the class ``kind``: sizes where it has them, and a layer of each kind that its default has."""
    default = kind()
    known = default.to_dict()
    known.pop("per_layer_config", None)
    given = {name: size for name, size in sizes.items() if name in known and size is not None}
    depth = next((name for name in _DEPTHS if name in known), None)
    kinds, kept = known.get("layer_types") or [], [0, 1]
    if kinds:
        firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        kept = sorted((firsts + [i for i in range(len(kinds)) if i not in firsts])[: max(2, len(firsts))])
        given[depth] = len(kept)
    for name, value in known.items():
        if depth and isinstance(value, list) and len(value) == known[depth] > 2:  # something for each layer
            given[name] = [value[i] for i in kept]
    for name, part in getattr(kind, "sub_configs", {}).items():
        part = part if (value := getattr(default, name, None)) is None else type(value)
        if hasattr(part, "to_dict") and part.__name__ != "AutoConfig":
            given[name] = _shrunk(part, sizes, {}).to_dict()
    return kind(**given | special)


def _model(of: Callable[..., Any], config: Any, attention: str) -> Any:
    """A model of random weights, so large that a wrong position shows, but for those that decide how a state decays."""
    with torch.device("meta"):
        size = sum(p.numel() for p in of(copy.deepcopy(config), attn_implementation=attention).parameters())
    if size > _LARGEST:
        raise NotTinyError(f"{size} parameters")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = of(config, attn_implementation=attention).eval()
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("A_log", "dt_bias", "time_decay", "slope")):
                continue
            noise, scale = torch.randn_like(parameter), 1.0 if "embed" in name or "wte" in name else 0.3
            parameter.copy_(scale * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number that is expected."""
    return float((found - expected).abs().max() / expected.abs().max())
