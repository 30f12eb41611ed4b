"""Random language models of a few thousand weights and a tokenizer of words, made without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = [f"w{index}" for index in range(60)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<end>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word; ``<end>`` closes chat turns, ``<eos>`` plain text."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<end>", "<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config(kind: str, **changes: Any) -> Any:
    """The config of a tiny model; ``changes`` override its fields."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
    }
    small: dict[str, Any] = {
        "llama": (LlamaConfig, {}),
        "tied": (LlamaConfig, {"tie_word_embeddings": True}),
        "qwen2": (Qwen2Config, {"use_sliding_window": False}),
        "gemma2": (Gemma2Config, {
            "head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
        }),
        "mistral": (MistralConfig, {"sliding_window": 6, "head_dim": 8}),
        "cohere": (CohereConfig, {"logit_scale": 0.3, "tie_word_embeddings": True}),
        "granite": (GraniteConfig, {"logits_scaling": 4.0, "tie_word_embeddings": True}),
    }
    if kind == "gpt2":
        return GPT2Config(**{
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": None,
            "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **changes,
        })
    cls, extra = small[kind]
    return cls(**{**size, **extra, **changes})


def tiny_model(kind: str = "llama", *, seed: int = 0, attention: str = "sdpa", double: bool = False, **changes: Any) -> Any:
    """A model with weights large enough that its predictions differ between contexts."""
    torch.manual_seed(seed)
    attention = "eager" if kind == "gemma2" else attention
    model = AutoModelForCausalLM.from_config(config(kind, **changes), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3 if "embed" in name or "wte" in name or "lm_head" in name else 0.15)
            elif "bias" in name:
                parameter.normal_(0.0, 0.2)
    return model.double() if double else model.float()


GGUF_TENSORS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: Any) -> None:
    """A Llama model with untied head as a float32 GGUF file, with a byte-pair tokenizer of made-up words."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<eos>", "w", "1", "w1", *(f"t{index}" for index in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        base, layer = name.removesuffix(".weight"), ""
        if base.startswith("model.layers."):
            _, _, number, base = base.split(".", 3)
            layer = f"blk.{number}."
        values = tensor.numpy()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(base)
        if heads:  # the rotary halves are interleaved in the file
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{layer}{GGUF_TENSORS[base]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
