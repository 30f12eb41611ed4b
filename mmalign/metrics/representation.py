"""Which neurons a model uses for some rows, and how alike it represents rows of different groups (languages)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from mmalign.errors import DataError
from mmalign.metrics import metric


def neuron_importance(modules: Mapping[str, nn.Module], losses: Iterable[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """First-order Taylor importance of every output neuron of some modules, ``[width]`` per module, in float64.

    ``Phi_i = |sum dL/dh_i h_i|``, the sum being over rows and positions of a batch, averaged over batches: how much the
    loss would change, to first order, if the neuron's output were zero (Molchanov et al. 2017, arXiv 1611.06440; as a
    diagnostic of multilingual models in Sun et al. 2024, arXiv 2408.06273; the order of sum and absolute value is ours).

    Args:
        modules: name -> module whose output (or the first of a tuple) ends in the neurons.
        losses: one function per batch that runs the model and returns its mean loss with a graph.

    Raises DataError when there is no batch, or when a module took no part in the loss.
    """
    totals: dict[str, Tensor] = {}
    batches = 0
    for loss in losses:
        outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        with ExitStack() as hooks, torch.enable_grad():
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(_keep(outputs[name])).remove)
            value = loss()
        missing = [name for name, kept in outputs.items() if not kept]
        if missing:
            raise DataError(f"the module {missing[0]!r} was not run by the loss")
        flat = [(name, tensor) for name, kept in outputs.items() for tensor in kept]
        gradients = torch.autograd.grad(value, [tensor for _, tensor in flat], allow_unused=True)
        sums: dict[str, Tensor] = {}
        for (name, tensor), gradient in zip(flat, gradients, strict=True):
            if gradient is None:
                raise DataError(f"the loss does not depend on the output of {name!r}")
            part = (gradient.double() * tensor.detach().double()).reshape(-1, tensor.shape[-1]).sum(0)
            sums[name] = sums[name] + part if name in sums else part
        for name, part in sums.items():
            totals[name] = totals.get(name, torch.zeros_like(part)) + part.abs()
        batches += 1
    if not batches:
        raise DataError("no batch: the importance of neurons needs at least one")
    return {name: total / batches for name, total in totals.items()}


def _keep(kept: list[Tensor]) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, inputs: object, output: object) -> Tensor | None:
        tensor = output[0] if isinstance(output, tuple) else output
        assert isinstance(tensor, Tensor)
        if not torch.is_grad_enabled():  # a trial forward of the policy, no part of the loss
            return None
        if tensor.requires_grad:
            kept.append(tensor)
            return None
        if isinstance(output, tuple):
            raise DataError("neurons of a frozen module with several outputs cannot be measured; unfreeze its input")
        kept.append(tensor.requires_grad_())
        return tensor

    return hook


@metric("representation_similarity", higher_is_better=True)
def representation_similarity(groups: Sequence[Tensor]) -> Tensor:
    """Cosine of the mean hidden states of every two groups, ``[K, K]`` float64 (or ``[layers, K, K]``).

    ``groups[k]`` is ``[N_k, H]`` (or ``[layers, N_k, H]``): the hidden state of the last token of each sentence, the
    sentences of different groups being translations of each other (Sun et al. 2024, arXiv 2408.06273). Raises DataError
    for groups of other sizes, without rows, or whose mean vanishes.
    """
    if not groups or any(group.dim() not in (2, 3) or not group.shape[-2] for group in groups):
        raise DataError("groups must be [N, H] or [layers, N, H] tensors with at least one row each")
    sizes = {(group.dim(), *group.shape[:-2], group.shape[-1]) for group in groups}
    if len(sizes) > 1:
        raise DataError("groups must agree in layers and width; the shapes are "
                        + ", ".join(str(tuple(group.shape)) for group in groups))
    means = torch.stack([group.double().mean(-2) for group in groups], dim=-2)
    norms = means.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise DataError("a group's mean hidden state is zero; a cosine with it has no meaning")
    unit = means / norms
    return (unit @ unit.mT).clamp(-1, 1)


@metric("hidden_state_similarity", higher_is_better=True)
def hidden_state_similarity(first: Tensor, second: Tensor, *, centred: bool = False) -> Tensor:
    """``[layers]`` float64: mean over rows of the cosine of two sets of hidden states ``[layers, N, H]``, row by row.

    Two models on the same statements (how far training moved a layer), or one model on questions and on their answers.
    ``centred`` first takes the mean over rows off each set: hidden states share a large common direction, which makes
    plain cosines high everywhere. Zhang et al. 2025, arXiv 2511.05933. Raises DataError for shapes that differ or are no
    ``[layers, N, H]``, for centring fewer than two rows, and for vectors without a direction.
    """
    if first.dim() != 3 or first.shape != second.shape or not first.shape[1]:
        raise DataError(f"hidden states have shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be the same "
                        "[layers, N, H]: models of one depth and width on the same rows")
    a, b = first.double(), second.double()
    if centred:
        if a.shape[1] < 2:
            raise DataError("centred similarity needs at least two rows")
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    sizes = a.norm(dim=-1), b.norm(dim=-1)
    if not bool((sizes[0] > 0).all() and (sizes[1] > 0).all()):
        raise DataError("a hidden state is zero (all rows alike, when centred); a cosine with it has no meaning")
    return ((a * b).sum(-1) / (sizes[0] * sizes[1])).clamp(-1, 1).mean(1)
