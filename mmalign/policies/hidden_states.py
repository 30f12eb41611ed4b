"""Hidden states of a language model at chosen layers and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.policies.modules import evaluating
from mmalign.policies.token_scores import language_model

Position = Literal["last", "mean", "all"]


@torch.no_grad()
def collect_hidden_states(
    model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[int] | None = None, position: Position = "last",
) -> Tensor:
    """Hidden states after the embedding (layer 0) and after each block, in evaluation mode, float32 on the CPU.

    Args:
        model: a causal transformers model, however it is wrapped.
        batch: ``input_ids[N, T]`` and ``attention_mask[N, T]`` (1 = token), padded on either side.
        layers: which of ``0 .. L`` (negative ones count from the end); None = all.
        position: ``last`` token of every row (read off the mask, so that the side of the padding does not matter),
            ``mean`` over its tokens, or ``all``.

    Returns:
        ``[layers, N, H]``, or ``[layers, N, T, H]`` for ``all``.

    Raises ValueError for rows without a token, unknown layers or positions, and models that return no hidden states.
    """
    if position not in ("last", "mean", "all"):
        raise ValueError(f"position is {position!r}; allowed are last, mean and all")
    ids, mask = batch["input_ids"], batch["attention_mask"].to(torch.long)
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise ValueError(f"input_ids and attention_mask have shapes {tuple(ids.shape)} and {tuple(mask.shape)}; both are [N, T]")
    if not bool(mask.any(1).all()):
        raise ValueError(f"row {int((~mask.any(1)).nonzero()[0])} has no token")
    inner: Any = language_model(model)
    device = next(inner.parameters()).device
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with evaluating(model):
        states = inner(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                       output_hidden_states=True, use_cache=False).hidden_states
    if not states:
        raise ValueError(f"{type(inner).__name__} returns no hidden states")
    wanted = range(len(states)) if layers is None else layers
    unknown = [layer for layer in wanted if not -len(states) <= layer < len(states)]
    if unknown:
        raise ValueError(f"layers names {unknown[0]}; the model has 0 (embedding) to {len(states) - 1}")
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    share = (mask / mask.sum(1, keepdim=True)).float()[..., None]
    picked = []
    for layer in wanted:
        state = states[layer].float().cpu()
        if position == "last":
            state = state[torch.arange(len(state)), last.cpu()]
        elif position == "mean":
            state = (state * share.cpu()).sum(1)
        picked.append(state)
    return torch.stack(picked)
