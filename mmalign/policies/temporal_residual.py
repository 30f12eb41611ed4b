"""Input embeddings mixed with those of the model's own predictions (the temporal residual of intuitive fine-tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.modules import evaluating


def input_embeddings(policy: CausalLMPolicy) -> nn.Module:
    """The layer that embeds token ids; raises ConfigError for a model that has none that could be changed from outside."""
    model: Any = policy.scores.model
    try:
        layer = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        layer = None
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"model.path: {type(model).__name__} has no input embeddings that can be mixed (inputs_embeds is not "
                          "supported); set loss.lam to 0 or use method: sft")
    return layer


def predict_actions(policy: CausalLMPolicy, rows: Rows) -> Tensor:
    """``[B, A]`` int64: the likeliest token at the place of every action, given the row before it; 0 outside the mask.

    One pass in evaluation mode without gradients.
    """
    layout = policy.token_layout(rows).to(policy.device)
    with evaluating(policy.module):
        return layout.scatter(policy.scores.greedy(layout))


@contextmanager
def residual_inputs(
    policy: CausalLMPolicy, rows: Rows, predicted: Tensor, share: Tensor, *, embedding_gradient: bool = False,
) -> Iterator[None]:
    """Inside the block, forwards of exactly ``rows`` read ``(1 - s) E(x_t) + s E(yhat_t)`` at their actions.

    The mix is made of what the embedding layer gives, so a scale inside the layer or after it applies once. Tokens
    that are no actions, and forwards of any other rows, are left alone. Source: Hua et al. 2024, arXiv 2405.11870.

    Args:
        policy: the language model.
        rows: the rows that the block scores.
        predicted: ``[B, A]`` int64, yhat of every action.
        share: ``[B, A]`` s in [0, 1].
        embedding_gradient: let gradients reach the embeddings from the input side. The released code embeds with a
            frozen copy that is renewed after every update: none do. With tied embeddings the output side still learns.
    """
    layer = input_embeddings(policy)
    layout = policy.token_layout(rows).to(policy.device)
    at = (layout.row, layout.column)
    tokens, shares = predicted.to(policy.device)[at], share.to(policy.device)[at]

    def mix(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not inputs or inputs[0].shape != layout.input_ids.shape or not torch.equal(inputs[0], layout.input_ids):
            return None
        # forward() rather than a call: hooks, this one among them, must not run again.
        other = module.forward(tokens[None])[0]
        flat = output.flatten(0, 1)
        weight = shares[:, None].to(flat.dtype)
        mixed = flat.index_put((layout.token,), (1 - weight) * flat[layout.token] + weight * other)
        if not embedding_gradient:
            # Still part of the graph, with a gradient of zero: distributed training waits for every parameter.
            mixed = mixed.detach() + 0.0 * flat
        return mixed.view_as(output)

    handle = layer.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
