"""Arithmetic on state dicts: one walker that every merge, average and interpolation goes through.

Names are visited in sorted order; every entry is computed in float32 (or float64 where asked or stored) and cast ONCE to its
storage dtype; names that share storage (tied embeddings) are computed once and stay tied; integer and boolean entries are
copied from the first state. States must have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def difference(
    minuend: State, subtrahend: State, *, dtype: torch.dtype | None = torch.float32, precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """``minuend - subtrahend``: a task vector (Ilharco et al. 2022, arXiv 2212.04089).

    Args:
        minuend: usually the fine-tuned weights.
        subtrahend: usually the base weights.
        dtype: storage dtype of the result; float32 by default because the difference of two half-precision numbers is
            not a half-precision number of the same size. None keeps each entry's own dtype.
        precision: dtype of the subtraction, float32 or float64.

    Returns:
        The differences of the floating-point entries. Integer and boolean entries have none and are left out.
    """
    _check_states([minuend, subtrahend])
    floating = {name for name in minuend if _is_floating(minuend[name])}
    first, second = ({name: state[name] for name in floating} for state in (minuend, subtrahend))
    return _walk([first, second], lambda a, b: a - b, precision=precision, dtype=dtype)


def add_scaled(
    base: State, delta: State, scale: float = 1.0, *, precision: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """``base + scale * delta`` in the dtypes of ``base``; entries without a delta are copied.

    Raises ValueError for a delta whose name is not in ``base``, or whose shape differs, or that is not floating point
    there.
    """
    unknown = sorted(delta.keys() - base.keys())
    if unknown:
        raise ValueError(f"delta has entries that base lacks: {_some(unknown)}")
    wrong = sorted(name for name in delta if not _is_floating(base[name]))
    if wrong:
        raise ValueError(f"delta changes entries that are not floating point: {_some(wrong)}")
    tied = _tied_groups([base])
    # A delta of one of two tied names moves both; of both, it must be one delta.
    whole: dict[str, Tensor] = {}
    for names in tied:
        given = [name for name in names if name in delta]
        if not given:
            continue
        if any(not torch.equal(delta[name], delta[given[0]]) for name in given[1:]):
            raise ValueError(f"delta has different values for the tied entries {_some(given)}; tied entries move together")
        whole.update(dict.fromkeys(names, delta[given[0]]))
    _check_states([{name: base[name] for name in whole}, whole])
    moved = _walk(
        [{name: base[name] for name in whole}, whole],
        lambda a, b: a + scale * b,
        precision=precision,
        tied=[[name for name in names if name in whole] for names in tied],
    )
    copied = _walk([{name: base[name] for name in base if name not in whole}], lambda a: a, precision=precision)
    return {name: moved[name] if name in moved else copied[name] for name in sorted(base)}


def lerp(first: State, second: State, t: float, *, precision: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """``(1 - t) * first + t * second``: ``t`` 0 is exactly the first state, 1 exactly the second.

    WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903) with first = zero-shot, second = fine-tuned. ``t`` outside [0, 1]
    extrapolates. Dtypes and integer entries are those of ``first``.
    """
    _check_states([first, second])
    return _walk([first, second], lambda a, b: (1.0 - t) * a + t * b, precision=precision)


def weighted_average(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """``sum_i w_i state_i``: model soups (Wortsman et al. 2022, arXiv 2203.05482), federated averaging.

    Args:
        states: at least one.
        weights: one per state; equal by default.
        normalize: divide the weights by their sum.
        precision: dtype of the sum, float32 or float64.

    Raises:
        ValueError: no state, another number of weights, weights that are not finite, or a zero sum when normalising.
    """
    if not states:
        raise ValueError("weighted_average got no states; at least 1 is needed")
    weights = [1.0] * len(states) if weights is None else list(weights)
    if len(weights) != len(states):
        raise ValueError(f"{len(weights)} weights for {len(states)} states; one each is needed")
    total = sum(weights)
    if not all(abs(w) < float("inf") for w in weights) or (normalize and total == 0):
        raise ValueError(f"weights are {weights}; they must be finite" + (" with a sum other than 0" if normalize else ""))
    shares = [w / total for w in weights] if normalize else weights
    _check_states(states)

    def average(*tensors: Tensor) -> Tensor:
        result = tensors[0] * shares[0]
        for tensor, share in zip(tensors[1:], shares[1:], strict=True):
            result.add_(tensor, alpha=share)
        return result

    return _walk(states, average, precision=precision)


@torch.no_grad()
def ema_update(average: State, current: State, decay: float, *, precision: torch.dtype = torch.float32) -> None:
    """``average <- decay * average + (1 - decay) * current``, in place, without a copy of the whole state.

    ``decay`` is the share of the OLD average that is kept. Integer and boolean entries are overwritten by the current
    ones (step counters of batch norm). Keep the average in float32: in bfloat16 an update of less than 1/256 is lost.

    Raises:
        ValueError: ``decay`` outside [0, 1], states with other names or shapes.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; it must lie in [0, 1]")
    _check_states([average, current])
    for names in _tied_groups([average]):
        old, new = average[names[0]], current[names[0]].to(average[names[0]].device)
        if not _is_floating(old):
            old.copy_(new)
        elif old.dtype == _precise(old, precision):
            old.lerp_(new.to(old.dtype), 1.0 - decay)
        else:
            old.copy_(torch.lerp(old.to(precision), new.to(precision), 1.0 - decay))


def _walk(
    states: Sequence[State],
    function: Callable[..., Tensor],
    *,
    precision: torch.dtype,
    dtype: torch.dtype | None = None,
    tied: Sequence[Sequence[str]] | None = None,
    named: bool = False,
) -> dict[str, Tensor]:
    """``function`` of the entries of all states, name by name; results never share storage with the inputs.

    ``named`` puts the (first) name of the entry before the tensors.
    """
    if precision not in (torch.float32, torch.float64):
        raise ValueError(f"precision is {precision}; allowed are torch.float32 and torch.float64")
    result: dict[str, Tensor] = {}
    for names in tied if tied is not None else _tied_groups(states):
        if not names:
            continue
        first = states[0][names[0]]
        if _is_floating(first):
            working = max((_precise(state[names[0]], precision) for state in states), key=_rank)
            entries = [state[names[0]].detach().to(device=first.device, dtype=working) for state in states]
            made = function(names[0], *entries) if named else function(*entries)
            value = made.to(first.dtype if dtype is None else dtype)
            if any(value.data_ptr() == state[names[0]].data_ptr() for state in states):
                value = value.clone()
        else:
            value = first.detach().clone()
        result.update(dict.fromkeys(names, value))
    return {name: result[name] for name in sorted(result)}


def _tied_groups(states: Sequence[State]) -> list[list[str]]:
    """Names grouped by being one tensor in EVERY state, in sorted order of their first name.

    A name tied in one state only is on its own: the result must be able to hold two values.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in sorted(states[0]):
        identity: list[object] = []
        for state in states:
            tensor = state[name]
            alone = tensor.numel() == 0 or tensor.device.type == "meta"
            storage = (str(tensor.device), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            identity.append(name if alone else storage)
        groups.setdefault(tuple(identity), []).append(name)
    return list(groups.values())


def _check_states(states: Sequence[State]) -> None:
    first = states[0]
    for number, state in enumerate(states[1:], start=2):
        if state.keys() != first.keys():
            only_first, only_other = sorted(first.keys() - state.keys()), sorted(state.keys() - first.keys())
            raise ValueError(
                f"state {number} has other entries than the first: missing {_some(only_first)}, unexpected {_some(only_other)}"
            )
        for name, tensor in state.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(first[name].shape)} in the first state and {tuple(tensor.shape)} in state "
                    f"{number}; resize the vocabulary first, or leave the entry out"
                )
            if _is_floating(tensor) != _is_floating(first[name]):
                raise ValueError(f"{name!r} is {first[name].dtype} in the first state and {tensor.dtype} in state {number}")


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _precise(tensor: Tensor, precision: torch.dtype) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    return torch.float64 if tensor.dtype == torch.float64 else precision


def _rank(dtype: torch.dtype) -> tuple[bool, int]:
    return dtype.is_complex, torch.empty((), dtype=dtype).element_size()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
