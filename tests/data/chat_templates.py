"""Chat templates in the styles met in practice, and small tokenizers that carry them."""

from __future__ import annotations

from typing import Any

from mmalign.data.encoding import IGNORED, Dropped, TextEncoding, encode_example
from mmalign.data.tiny_llama import CHATML as CHATML_MARKED
from mmalign.data.tiny_llama import build_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TURN = "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
# Marks around the words alone: the end token lies outside.
CHATML_MARKED_WORDS = CHATML_MARKED.replace(_TURN, "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
# Marks around the separator as well.
CHATML_MARKED_SEPARATOR = CHATML_MARKED.replace(
    _TURN, "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
).replace("{% endif %}{{ '\n' }}{% endfor %}", "{{ '\n' }}{% endif %}{% endfor %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# Earlier reasoning is dropped, as Qwen3 does: what was rendered for turn 1 changes once turn 2 is there.
DROPS_REASONING = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% set ns = namespace(after=false) %}"
    "{% for m in messages %}{% if m is sameas last or m == last %}{% set ns.after = true %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% set words = m['content'] %}"
    "{% if m['role'] == 'assistant' and not ns.after %}{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and ns.after and '<think>' not in words %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ words + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a thought that finished turns do not show (R1 style).
OPENS_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'].split('</think>')[-1] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# No rendering is a prefix of a longer one: the number of messages stands first.
COUNTS_MESSAGES = (
    "{{ messages | length }} messages\n{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Neither a prefix nor the words themselves are kept.
SHOUTS = (
    "{{ messages | length }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '<|im_end|>' }}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tokenizer_with(template: str | None, *, bos: bool = False, end: str = "<|im_end|>") -> Any:
    """The tiny byte-level tokenizer with a template; ``bos`` makes it put <s> before plain text."""
    tokenizer = build_tokenizer()
    extra = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", end
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def stretches(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """Text of every maximal run of trained tokens."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert labels[0] == IGNORED
    runs: list[list[int]] = []
    for position, label in enumerate(labels):
        if label == IGNORED:
            continue
        if position and labels[position - 1] != IGNORED and runs:
            runs[-1].append(label)
        else:
            runs.append([label])
    return [tokenizer.decode(run) for run in runs]


def learned(example: dict[str, Any], tokenizer: Any, **options: Any) -> list[str]:
    """What a row teaches, as text."""
    result = encode_example(example, tokenizer, TextEncoding(**options))
    assert not isinstance(result, Dropped), result.reason
    return stretches(result["input_ids"], result["labels"], tokenizer)
