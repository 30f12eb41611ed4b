"""A small Llama that reads words: a task in a few hundred words is learned in a minute instead of an hour of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from mmalign.core.seeding import generator

WORD = re.compile(r"### [A-Z][A-Za-z ]*:|\n|\w+|[^\w\s]")


def build_word_llama(
    folder: Path, texts: Iterable[str], *, seed: int = 0, hidden: int = 96, layers: int = 2, window: int = 512,
) -> Path:
    """Write a random model whose vocabulary are the words of ``texts``; decoded words are joined by spaces."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in WORD.findall(text)})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD.pattern), "isolated"), pre_tokenizers.Split(Regex(r"^[^\S\n]+$"), "removed"),
    ])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<eos>", "<unk>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                        model_max_length=window, clean_up_tokenization_spaces=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=window, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3 / hidden**0.25, generator=generator(seed, "init", "word_llama", name))
    model.generation_config = GenerationConfig(eos_token_id=[1], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
