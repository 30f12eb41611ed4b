"""Layer by layer: how alike two checkpoints represent questions about codes, and the statements that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.data.code_trees import CodeTree
from mmalign.errors import ConfigError
from mmalign.metrics.representation import hidden_state_similarity
from mmalign.policies.hidden_states import collect_hidden_states


@dataclass(frozen=True)
class Probes:
    """Pairs of statements about the same codes."""

    queries: list[str]
    """Interrogative: what a code means."""
    answers: list[str]
    """Declarative: that a code refers to what it means."""


def make_probes(tree: CodeTree, codes: Sequence[str]) -> Probes:
    """The probes of some codes; a statement ends with its last word, without a full stop."""
    kind = tree.name.replace("_", "-")
    return Probes([f"What is the {kind} code {code}" for code in codes],
                  [f"The {kind} code {code} refers to {tree.descriptions[code]}" for code in codes])


def statement_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a statement with what the tokenizer puts before it and nothing after it.

    The last token must be the statement's own: an end mark or a chat template behind it would be the same for all.
    """
    bare = list(tokenizer(text, add_special_tokens=False).input_ids)
    full = list(tokenizer(text).input_ids)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[: start + len(bare)]
    return bare


def probe_states(policy: Any, texts: Sequence[str], *, rows_per_forward: int = 16) -> Tensor:
    """``[layers + 1, N, H]``: hidden state of the last token of every statement."""
    parts = []
    for start in range(0, len(texts), rows_per_forward):
        ids = [torch.tensor(statement_ids(policy.tokenizer, text)) for text in texts[start : start + rows_per_forward]]
        mask = [torch.ones_like(row) for row in ids]
        batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
                 "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)}
        parts.append(collect_hidden_states(policy.module, batch))
    return torch.cat(parts, dim=1)


def check_comparable(first: Any, second: Any) -> None:
    """Raise ConfigError when two policies differ in tokenizer, depth or width."""
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise ConfigError("compare_with.path: the two models have different tokenizers; states at a token cannot be compared")
    for name, key in (("layers", "num_hidden_layers"), ("hidden size", "hidden_size")):
        sizes = [getattr(policy.scores.config, key) for policy in (first, second)]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"compare_with.path: the two models differ in {name}: {sizes[0]} and {sizes[1]}; compare "
                              "checkpoints of one architecture")


def similarity_curves(states: dict[str, dict[str, Tensor]]) -> list[dict[str, float | int | str]]:
    """One record per curve and layer: ``curve, centred, layer, cosine``.

    ``states`` maps the label of a model to its ``queries`` and ``answers``, ``[layers, N, H]`` each. Curves: between two
    models on queries and on answers, and within each model between the query and the answer of a code.
    """
    labels = list(states)
    pairs = {f"within {label}": (states[label]["queries"], states[label]["answers"]) for label in labels}
    if len(labels) == 2:
        pairs |= {f"between models, {kind}": (states[labels[0]][kind], states[labels[1]][kind])
                  for kind in ("queries", "answers")}
    records: list[dict[str, float | int | str]] = []
    for curve, (a, b) in pairs.items():
        # Queries share their last word in some wordings, so layer 0 may be one vector for all: nothing to centre there.
        for centred in (False, True):
            for layer in range(len(a)):
                spread = min(float((side[layer] - side[layer].mean(0)).norm(dim=-1).min()) for side in (a, b))
                if centred and (a.shape[1] < 2 or spread <= 1e-6):
                    continue
                cosine = hidden_state_similarity(a[layer : layer + 1], b[layer : layer + 1], centred=centred)
                records.append({"curve": curve, "centred": int(centred), "layer": layer, "cosine": float(cosine[0])})
    return records
