"""transformers models of a few thousand random parameters, built from configs: nothing is downloaded.

Every number that could be mistaken for another one (width, feedforward width, entries) is different.
"""

from typing import Any

import transformers as hf
from torch import nn

WIDTH, FFN, VOCABULARY, POSITIONS = 16, 24, 40, 20

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Transformers' usual 0.02 would leave the logits of so narrow a model next to zero, and a wrong weight hard to see.
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
_SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}


def bert(head: type = hf.BertForSequenceClassification, **fields: Any) -> nn.Module:
    return head(hf.BertConfig(**{**SIZES, **fields}))


def roberta(head: type = hf.RobertaForSequenceClassification, **fields: Any) -> nn.Module:
    return head(hf.RobertaConfig(**{**SIZES, **TOKENS, **fields}))


def distilbert(head: type = hf.DistilBertForSequenceClassification, **fields: Any) -> nn.Module:
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": FFN}
    return head(hf.DistilBertConfig(**{**sizes, "vocab_size": VOCABULARY, **fields}))


def deberta(head: type = hf.DebertaV2ForSequenceClassification, **fields: Any) -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    return head(hf.DebertaV2Config(**{**SIZES, **relative, "share_att_key": True, **fields}))


def gpt2(head: type = hf.GPT2LMHeadModel, **fields: Any) -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": POSITIONS}
    return head(hf.GPT2Config(**{**sizes, **TOKENS, "initializer_range": 0.2, **fields}))


def llama(head: type = hf.LlamaForCausalLM, **fields: Any) -> nn.Module:
    """Grouped-query attention (two query heads share one key and value head); the output is tied to the embedding."""
    grouped = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    return head(hf.LlamaConfig(**{**SIZES, **TOKENS, **grouped, **fields}))


def qwen2(head: type = hf.Qwen2ForCausalLM, **fields: Any) -> nn.Module:
    """Biases on queries, keys and values alone."""
    return head(hf.Qwen2Config(**{**SIZES, **TOKENS, "num_key_value_heads": 1, **fields}))


def qwen3(head: type = hf.Qwen3ForCausalLM, **fields: Any) -> nn.Module:
    """Heads wider than width / heads; normalised queries and keys."""
    return head(hf.Qwen3Config(**{**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 12, **fields}))


def gemma3(head: type = hf.Gemma3ForCausalLM, **fields: Any) -> nn.Module:
    """A layer that sees the last four tokens, then one that sees all; the output is tied to the embedding."""
    heads = {"num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 12}
    window = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return head(hf.Gemma3TextConfig(**{**SIZES, **TOKENS, **heads, **window, **fields}))


def gemma2(head: type = hf.Gemma2ForCausalLM, **fields: Any) -> nn.Module:
    """Squeezes its logits between -3 and 3."""
    heads = {"num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0}
    return head(hf.Gemma2Config(**{**SIZES, **TOKENS, **heads, **fields}))


def cohere(head: type = hf.CohereForCausalLM, **fields: Any) -> nn.Module:
    """Multiplies its logits."""
    return head(hf.CohereConfig(**{**SIZES, **TOKENS, "logit_scale": 0.3, **fields}))


def granite(head: type = hf.GraniteForCausalLM, **fields: Any) -> nn.Module:
    """Divides its logits."""
    return head(hf.GraniteConfig(**{**SIZES, **TOKENS, "logits_scaling": 2.0, **fields}))


def mixtral(head: type = hf.MixtralForCausalLM, **fields: Any) -> nn.Module:
    """Two experts; with ``output_router_logits`` its loss says how unevenly they are used, too."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1}
    return head(hf.MixtralConfig(**{**SIZES, **TOKENS, **experts, **fields}))


def mistral(head: type = hf.MistralForCausalLM, **fields: Any) -> nn.Module:
    """Every layer sees the last four tokens alone."""
    return head(hf.MistralConfig(**{**SIZES, **TOKENS, "num_key_value_heads": 1, "sliding_window": 4, **fields}))


def mamba(head: type = hf.MambaForCausalLM, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    return head(hf.MambaConfig(**{**sizes, **TOKENS, "state_size": 5, "time_step_rank": 3, **fields}))


def t5(head: type = hf.T5ForConditionalGeneration, **fields: Any) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": FFN, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return head(hf.T5Config(**{**sizes, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, **fields}))


def bart(head: type = hf.BartForConditionalGeneration, **fields: Any) -> nn.Module:
    return head(hf.BartConfig(**{**_SEQ2SEQ, **TOKENS, "max_position_embeddings": POSITIONS, **fields}))


def whisper(head: type = hf.WhisperForConditionalGeneration, **fields: Any) -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": POSITIONS}
    return head(hf.WhisperConfig(**{**_SEQ2SEQ, **TOKENS, **sizes, **fields}))


def vit(head: type = hf.ViTForImageClassification, **fields: Any) -> nn.Module:
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return head(hf.ViTConfig(**{**sizes, "intermediate_size": FFN, "image_size": 8, "patch_size": 4, **fields}))


def clip_text(head: type = hf.CLIPTextModel, **fields: Any) -> nn.Module:
    return head(hf.CLIPTextConfig(**{**SIZES, **TOKENS, **fields}))
