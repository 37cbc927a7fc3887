"""One tiny random model of every architecture that extraction promises to serve, as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from toy_model import VOCABULARY, toy_tokenizer

N_LAYERS = 4
WINDOW = 4
"""Tokens of a sliding window: fewer than most texts have."""


@dataclasses.dataclass(frozen=True)
class Animal:
    """A configuration class of transformers, and what differs from `_COMMON` to make it tiny."""

    config: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    encoder: bool = False
    """Texts are framed by [CLS] and [SEP]."""


_COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # A wide initialisation makes layers and texts differ by far more than rounding.
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
_GPT = {"n_embd": 16, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 64}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_HALF = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2),
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}

ZOO: dict[str, Animal] = {
    "llama": Animal("LlamaConfig"),
    "llama-bidirectional": Animal("LlamaConfig", {"is_causal": False}),
    "mistral": Animal("MistralConfig", {"sliding_window": None}),
    "mistral-window": Animal("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": Animal("Qwen2Config"),
    "qwen2-window": Animal(
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": Animal("Qwen3Config", {"head_dim": 8}),
    "qwen3-moe": Animal("Qwen3MoeConfig", {"head_dim": 8, **_MOE}),
    # With 0.5 its recurrence amplifies what sums in another order round: 2e-5 on an AMD Zen 4.
    "qwen3-next": Animal(
        "Qwen3NextConfig", {"head_dim": 8, **_MOE, **_LINEAR, "initializer_range": 0.3}
    ),
    "gemma": Animal("GemmaConfig", {"head_dim": 8}),
    "gemma2": Animal(
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.0,  # its scores are larger
        },
    ),
    "gemma3": Animal("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **_HALF}),
    "gpt-oss": Animal(
        "GptOssConfig", {"head_dim": 8, **_HALF, **_EXPERTS, "rope_parameters": _ROTARY}
    ),
    "llama4": Animal(
        "Llama4TextConfig",
        {"head_dim": 8, **_EXPERTS, "attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 0, 1]},
    ),
    "phi3": Animal("Phi3Config"),
    "gpt2": Animal("GPT2Config", _GPT),
    "gpt-neox": Animal("GPTNeoXConfig"),
    "opt": Animal("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "opt-norm-after": Animal(
        "OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    "falcon": Animal("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon-alibi": Animal(
        "FalconConfig", {"alibi": True, "multi_query": False, "parallel_attn": False}
    ),
    "bloom": Animal("BloomConfig", {"n_layer": N_LAYERS, "n_head": 2}),
    "olmo2": Animal("Olmo2Config"),
    "cohere2": Animal("Cohere2Config", _HALF),
    "mixtral": Animal("MixtralConfig", _EXPERTS),
    "mamba": Animal("MambaConfig", {"state_size": 4}),
    "bert": Animal("BertConfig", encoder=True),
    "roberta": Animal("RobertaConfig", encoder=True),
    "xlm-roberta": Animal("XLMRobertaConfig", encoder=True),
    "distilbert": Animal(
        "DistilBertConfig", {"dim": 16, "hidden_dim": 32, "n_layers": N_LAYERS, "n_heads": 2}, True
    ),
    "deberta-v2": Animal("DebertaV2Config", {**_DEBERTA, "conv_kernel_size": 3}, True),
    "deberta-v3": Animal("DebertaV2Config", {**_DEBERTA, "norm_rel_ebd": "layer_norm"}, True),
    "modernbert": Animal(
        "ModernBertConfig", {"global_attn_every_n_layers": 3, "local_attention": WINDOW}, True
    ),
    "electra": Animal("ElectraConfig", {"embedding_size": 8}, True),
}


def save_animal(name: str, folder: Path, animal: Animal | None = None) -> Path:
    """Save a random model of that architecture, with a tokenizer it accepts."""
    animal = animal or ZOO[name]
    config = getattr(transformers, animal.config)(**_COMMON | animal.settings)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    _tokenizer(config.model_type, animal).save_pretrained(folder)
    return folder


def _tokenizer(model_type: str, animal: Animal) -> Any:
    if model_type != "qwen2":
        return toy_tokenizer(special_tokens=animal.encoder)
    # AutoTokenizer loads every Qwen2 as a byte-level BPE, whatever lies there.
    alphabet = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char.isascii()]
    vocabulary = {char: token for token, char in enumerate(alphabet[:90])}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
