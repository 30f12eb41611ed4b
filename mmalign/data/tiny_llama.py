"""The ``tiny_llama`` asset: a random two-layer Llama and a byte-level tokenizer with a ChatML template.

It says nothing sensible; it has every part a real model has, takes a second to build, and is the same everywhere:
for tests, for configurations to be tried out, and for learning a first task from nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmalign.core.seeding import generator
from mmalign.data.progress import without_transformers_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with ``{% generation %}`` marks and no default system message."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN_SIZE = 64
WINDOW = 1024

# Merged in this order, so that common words are one or two tokens long; digits are never merged.
_WORDS = (
    " the", " is", " and", " of", " to", " a", " in", " are", " has", " have", " how", " many", " what", " with",
    " each", " answer", " number", " only", " yes", " no", " left", " now", " does", " for", " you", " that", " this",
    "What", "How", "Answer", "user", "assistant", "system", "Tom", "The", "Yes", "No",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 3 special tokens, 256 bytes, and some hundred merges that spell common words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = list(word.replace(" ", "Ġ"))
        while len(pieces) > 1:
            # Left to right: prefixes are shared between words, so that the table stays short.
            joined = pieces[0] + pieces[1]
            if joined not in vocabulary:
                vocabulary[joined] = len(vocabulary)
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [joined]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[2], pad_token=SPECIAL_TOKENS[0],
        model_max_length=WINDOW, clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_tiny_llama(folder: Path, *, seed: int = 0) -> None:
    """Write the model and its tokenizer to ``folder``; the weights depend on the seed alone (CPU, float32)."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN_SIZE, intermediate_size=2 * HIDDEN_SIZE, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                # Wide enough that two tokens differ clearly in probability, unlike the customary 0.02.
                spread = 1 / math.sqrt(HIDDEN_SIZE)
                parameter.normal_(0.0, spread, generator=generator(seed, "init", "tiny_llama", name))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id,
    )
    with without_transformers_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
