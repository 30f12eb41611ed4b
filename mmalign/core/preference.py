"""The pair-loss table and the point losses: functions of scores, whatever the modality the scores come from.

A row of the table declares what it reads (``inputs``), how sequence scores are formed (``logratio``: sum or mean over
actions) and whether it compares with a reference; the objective computes exactly that. Losses return one value per pair.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from mmalign.core.logprobs import ActionScores
from mmalign.core.registry import Registry

Function = TypeVar("Function", bound=Callable[..., Tensor])

INPUTS = frozenset({
    "chosen_logratio", "rejected_logratio", "chosen_logp", "rejected_logp", "gold_logp", "generated_logp",
    "ref_chosen_logp", "ref_rejected_logp", "ref_gold_logp", "ref_generated_logp", "generated_logratio", "sample_logratio",
    "margin", "win_prob", "shift", "kl", "label", "teacher_logp",
})
"""What a row may read; all are ``[B]``. ``sample`` is the only sample of a row that holds one."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of the pair-loss table."""

    name: str
    function: Callable[..., Tensor]
    """``(**inputs [B], *, options) -> [B]``."""
    inputs: tuple[str, ...] = ("chosen_logratio", "rejected_logratio")
    logratio: Literal["sum", "mean"] = "sum"
    """Scores are sums or means of a row's action log-probs."""
    reference: bool = True
    """Whether log-ratios are taken to a reference model."""
    coupling: Literal["none", "update"] = "none"
    """``update``: the loss of a pair depends on all pairs of the update."""
    prepared: tuple[str, ...] = ()
    """Statistics of the whole update that the objective must supply: ``shift``, ``kl``."""
    difference_only: bool = False
    """Depends on ``chosen - rejected`` only, so that the partition function cancels (f-divergences are allowed)."""

    @property
    def default_beta(self) -> float:
        """The default inverse temperature, 1 when the loss has none."""
        parameter = inspect.signature(self.function).parameters.get("beta")
        return float(parameter.default) if parameter is not None else 1.0


PREFERENCE_LOSSES: Registry[PreferenceLoss] = Registry("preference loss")


def preference_loss(
    name: str, *, inputs: tuple[str, ...] = ("chosen_logratio", "rejected_logratio"), logratio: Literal["sum", "mean"] = "sum",
    reference: bool = True, coupling: Literal["none", "update"] = "none", prepared: tuple[str, ...] = (),
    difference_only: bool = False, aliases: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register a pair loss; raises ValueError for an input that is not in :data:`INPUTS`."""
    unknown = set(inputs) - INPUTS
    if unknown:
        raise ValueError(f"inputs {sorted(unknown)} of loss {name!r} are unknown; allowed are {sorted(INPUTS)}")

    def register(function: Function) -> Function:
        row = PreferenceLoss(name, function, inputs, logratio, reference, coupling, prepared, difference_only)
        PREFERENCE_LOSSES.register(name, aliases=aliases)(row)
        return function

    return register


def _check(beta: float, *tensors: Tensor) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1 or any(t.dim() != 1 for t in tensors):
        raise ValueError(f"scores have shapes {sorted(shapes)}; all must be [B]")


def _flip_rate(name: str, value: float, interval: str) -> None:
    """Check a rate against an interval written as in mathematics, such as ``[0, 0.5)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"label_smoothing of {name} is {value}; it must lie in {interval}")


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, stable on both sides of ``-log 2``."""
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -torch.ones_like(x)))),
                       torch.log1p(-torch.exp(torch.where(near, -torch.ones_like(x), x))))


@preference_loss("sigmoid", difference_only=True, aliases=("dpo", "sigmoid_norm_rso"))
def sigmoid(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """``-log sigmoid(beta (u_w - u_l))``. DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    _check(beta, chosen_logratio, rejected_logratio)
    return -logsigmoid(beta * (chosen_logratio - rejected_logratio))


@preference_loss("cdpo", difference_only=True)
def cdpo(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """``-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)``: labels are flipped with rate ``e``. Mitchell 2023."""
    _check(beta, chosen_logratio, rejected_logratio)
    _flip_rate("cdpo", label_smoothing, "[0, 1]")
    z = beta * (chosen_logratio - rejected_logratio)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


@preference_loss("robust", difference_only=True)
def robust(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """``[-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)] / (1 - 2e)``: unbiased under label flips.

    Source: Chowdhury et al. 2024, arXiv 2403.00409, equation 12.
    """
    _check(beta, chosen_logratio, rejected_logratio)
    _flip_rate("robust", label_smoothing, "[0, 0.5)")
    z = beta * (chosen_logratio - rejected_logratio)
    return (-(1 - label_smoothing) * logsigmoid(z) + label_smoothing * logsigmoid(-z)) / (1 - 2 * label_smoothing)


@preference_loss("hinge", difference_only=True, aliases=("hinge_norm",))
def hinge(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """``max(0, 1 - beta D)``. RSO: Liu et al. 2023, arXiv 2309.06657, equation 9 (beta = its gamma)."""
    _check(beta, chosen_logratio, rejected_logratio)
    return torch.relu(1 - beta * (chosen_logratio - rejected_logratio))


@preference_loss("slic", reference=False, difference_only=True)
def slic(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """:func:`hinge` on log-probs without a reference. SLiC-HF: Zhao et al. 2023, arXiv 2305.10425."""
    return hinge(chosen_logratio, rejected_logratio, beta=beta)


@preference_loss("ipo", logratio="mean", difference_only=True)
def ipo(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """``(D - 1/(2 beta))^2`` on mean log-ratios, as the authors ran it. Azar et al. 2023, arXiv 2310.12036, equation 17."""
    _check(beta, chosen_logratio, rejected_logratio)
    return (chosen_logratio - rejected_logratio - 1 / (2 * beta)).square()


@preference_loss("ipo_sum", difference_only=True)
def ipo_sum(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """:func:`ipo` on summed log-ratios, as printed in the paper."""
    return ipo(chosen_logratio, rejected_logratio, beta=beta)


@preference_loss("sigmoid_len", logratio="mean", difference_only=True)
def sigmoid_len(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """:func:`sigmoid` on mean log-ratios (length-normalised DPO). Lambert et al. 2024 (Tulu 3), arXiv 2411.15124."""
    return sigmoid(chosen_logratio, rejected_logratio, beta=beta)


@preference_loss("exo", difference_only=True, aliases=("exo_pair",))
def exo(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Reverse KL of the implied preference ``q = sigmoid(beta D)`` to the smoothed label.

    ``q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)``. Ji et al. 2024, arXiv 2402.00856, equation 16.
    """
    _check(beta, chosen_logratio, rejected_logratio)
    _flip_rate("exo", label_smoothing, "(0, 1)")
    z = beta * (chosen_logratio - rejected_logratio)
    return (z.sigmoid() * (logsigmoid(z) - math.log1p(-label_smoothing))
            + (-z).sigmoid() * (logsigmoid(-z) - math.log(label_smoothing)))


@preference_loss("nca", aliases=("nca_pair",))
def nca(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.01) -> Tensor:
    """``-log sigmoid(b u_w) - (log sigmoid(-b u_w) + log sigmoid(-b u_l)) / 2``. Chen et al. 2024, arXiv 2402.05369."""
    _check(beta, chosen_logratio, rejected_logratio)
    chosen, rejected = beta * chosen_logratio, beta * rejected_logratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@preference_loss("bco_pair")
def bco_pair(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1, reward_shift: float = 0.0) -> Tensor:
    """``-log sigmoid(b u_w - d) - log sigmoid(-(b u_l - d))`` with a constant d. Jung et al. 2024, arXiv 2404.04656."""
    _check(beta, chosen_logratio, rejected_logratio)
    return -logsigmoid(beta * chosen_logratio - reward_shift) - logsigmoid(reward_shift - beta * rejected_logratio)


@preference_loss("bco", inputs=("chosen_logratio", "rejected_logratio", "shift"), prepared=("shift",))
def bco(chosen_logratio: Tensor, rejected_logratio: Tensor, shift: Tensor, *, beta: float = 0.1) -> Tensor:
    """:func:`bco_pair` with ``shift[B]`` = the running mean of all ``b u`` seen so far, detached; equation 11 of the paper."""
    _check(beta, chosen_logratio, rejected_logratio)
    d = shift.detach()
    return -logsigmoid(beta * chosen_logratio - d) - logsigmoid(d - beta * rejected_logratio)


@preference_loss("sppo_hard")
def sppo_hard(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 1e-3) -> Tensor:
    """``(u_w - 1/(2b))^2 + (u_l + 1/(2b))^2`` with b = 1/eta. Wu et al. 2024, arXiv 2405.00675, equation 4.8."""
    _check(beta, chosen_logratio, rejected_logratio)
    target = 1 / (2 * beta)
    return (chosen_logratio - target).square() + (rejected_logratio + target).square()


@preference_loss("sppo_soft", inputs=("chosen_logratio", "rejected_logratio", "win_prob"))
def sppo_soft(chosen_logratio: Tensor, rejected_logratio: Tensor, win_prob: Tensor, *, beta: float = 1e-3) -> Tensor:
    """``(u_w - (P - 1/2) / b)^2 + (u_l + (P - 1/2) / b)^2`` with the estimated win rate P of the chosen sample.

    Wu et al. 2024, arXiv 2405.00675, equation 4.7; P = 1 is :func:`sppo_hard`. Raises ValueError for P outside [0, 1].
    """
    _check(beta, chosen_logratio, rejected_logratio, win_prob)
    if bool(((win_prob < 0) | (win_prob > 1)).any()):
        raise ValueError("win_prob must lie in [0, 1]: the estimated probability that chosen beats rejected")
    target = (win_prob - 0.5) / beta
    return (chosen_logratio - target).square() + (rejected_logratio + target).square()


@preference_loss("aot", inputs=("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), coupling="update",
                 aliases=("aot_pair",))
def aot(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`cdpo` on sorted policy margins against sorted reference margins. Melnyk et al. 2024, arXiv 2406.05882."""
    policy = (chosen_logp - rejected_logp).sort().values
    reference = (ref_chosen_logp - ref_rejected_logp).sort().values
    return cdpo(policy, reference, beta=beta, label_smoothing=label_smoothing)


@preference_loss("aot_unpaired", coupling="update")
def aot_unpaired(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.01, label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`cdpo` on sorted chosen against sorted rejected log-ratios: pairs need not belong together."""
    return cdpo(chosen_logratio.sort().values, rejected_logratio.sort().values, beta=beta, label_smoothing=label_smoothing)


@preference_loss("apo_zero")
def apo_zero(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """``1 - sigmoid(b u_w) + sigmoid(b u_l)``. D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7."""
    _check(beta, chosen_logratio, rejected_logratio)
    return (-beta * chosen_logratio).sigmoid() + (beta * rejected_logratio).sigmoid()


@preference_loss("apo_down")
def apo_down(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """``sigmoid(b u_w) + 1 - sigmoid(b (u_w - u_l))``. D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8."""
    _check(beta, chosen_logratio, rejected_logratio)
    return (beta * chosen_logratio).sigmoid() + (-beta * (chosen_logratio - rejected_logratio)).sigmoid()


@preference_loss("discopop", difference_only=True)
def discopop(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.05, tau: float = 0.05) -> Tensor:
    """``(1 - s)(-log sigmoid(x)) + s exp(-x)``, x = b D, s = sigmoid(x / tau). Lu et al. 2024, arXiv 2406.08414, equation 5."""
    _check(beta, chosen_logratio, rejected_logratio)
    if tau <= 0:
        raise ValueError(f"tau is {tau}; it must be positive")
    x = beta * (chosen_logratio - rejected_logratio)
    gate = (x / tau).sigmoid()
    return (1 - gate) * -logsigmoid(x) + gate * torch.exp((-x).clamp(max=20))


@preference_loss("cpo", reference=False, difference_only=True)
def cpo(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """The pair term of CPO: :func:`sigmoid` without a reference; add ``{name: nll, on: chosen}``. arXiv 2401.08417."""
    return sigmoid(chosen_logratio, rejected_logratio, beta=beta)


@preference_loss("simpo", logratio="mean", reference=False, difference_only=True)
def simpo(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 2.5, gamma: float = 1.375) -> Tensor:
    """``-log sigmoid(b (A_w - A_l) - gamma)`` on mean log-probs. Meng et al. 2024, arXiv 2405.14734, equation 6."""
    _check(beta, chosen_logratio, rejected_logratio)
    return -logsigmoid(beta * (chosen_logratio - rejected_logratio) - gamma)


@preference_loss("alphapo", logratio="mean", reference=False)
def alphapo(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 2.5, gamma: float = 1.375, alpha: float = 0.25,
) -> Tensor:
    """:func:`simpo` on ``r = (1 - exp(-alpha A)) / alpha``. Gupta et al. 2025, arXiv 2501.03884, equation 8."""
    if alpha == 0:
        return simpo(chosen_logratio, rejected_logratio, beta=beta, gamma=gamma)
    chosen, rejected = (-torch.expm1(-alpha * a) / alpha for a in (chosen_logratio, rejected_logratio))
    return simpo(chosen, rejected, beta=beta, gamma=gamma)


@preference_loss("odds_ratio", logratio="mean", reference=False)
def odds_ratio(chosen_logratio: Tensor, rejected_logratio: Tensor) -> Tensor:
    """``-log sigmoid(logit(exp A_w) - logit(exp A_l))``: ORPO's pair term; weigh it by lambda beside an nll term.

    Mean log-probs at 0 are clamped to -1e-6. Hong et al. 2024, arXiv 2403.07691, equation 7.
    """
    _check(1.0, chosen_logratio, rejected_logratio)
    chosen, rejected = chosen_logratio.clamp(max=-1e-6), rejected_logratio.clamp(max=-1e-6)
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -logsigmoid(log_odds)


@preference_loss("bt_reward", inputs=("chosen_logp", "rejected_logp"), reference=False, aliases=("bradley_terry",))
def bt_reward(
    chosen_logp: Tensor, rejected_logp: Tensor, *, margin: Tensor | float = 0.0, center_coef: float = 0.0,
) -> Tensor:
    """``-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2`` on reward scores; ``margin`` is one number or ``[B]``.

    Margin: Touvron et al. 2023 (Llama 2), arXiv 2307.09288, equation 2. Centring: Eisenstein et al. 2023, arXiv 2312.09244.
    """
    _check(1.0, chosen_logp, rejected_logp)
    return -logsigmoid(chosen_logp - rejected_logp - margin) + center_coef * (chosen_logp + rejected_logp).square()


@preference_loss("bt_reward_margin", inputs=("chosen_logp", "rejected_logp", "margin"), reference=False)
def bt_reward_margin(chosen_logp: Tensor, rejected_logp: Tensor, margin: Tensor, *, center_coef: float = 0.0) -> Tensor:
    """:func:`bt_reward` with ``margin[B]`` from the data column of that name."""
    return bt_reward(chosen_logp, rejected_logp, margin=margin, center_coef=center_coef)


@preference_loss("linear", inputs=("generated_logratio",))
def linear(generated_logratio: Tensor, *, floor: float | None = None) -> Tensor:
    """The log-ratio of the policy's own sample itself, to be given a weight (SELM's exploration term).

    Unbounded below; with ``floor = c`` a row whose log-ratio is under ``-c`` has no gradient. Raises ValueError for a
    floor that is not positive.
    """
    if floor is None:
        return generated_logratio
    if floor <= 0:
        raise ValueError(f"floor is {floor}; it must be positive")
    return torch.where(generated_logratio < -floor, generated_logratio.detach(), generated_logratio)


@preference_loss("poft", inputs=("sample_logratio", "teacher_logp"), logratio="mean", reference=False, difference_only=True)
def poft(sample_logratio: Tensor, teacher_logp: Tensor, *, beta: float = 1.0, offset: float = 0.0) -> Tensor:
    """``-log sigmoid(s (A - r) + g)``: :func:`sigmoid` of the mean log-prob A against other models' mean r of the same sample.

    Its gradient is that of the mean negative log-likelihood times ``s sigmoid(s (r - A) - g)``: rows that the teachers
    find unlikely count less. ``beta`` = s, ``offset`` = g. Fan et al. 2024, arXiv 2412.12865, equation 6. Raises
    ValueError for a teacher score above 0 or not finite.
    """
    if not bool(torch.isfinite(teacher_logp).all()) or bool((teacher_logp > 0).any()):
        raise ValueError("teacher_logp holds a value above 0 or not finite; mean log-probs of tokens are finite and <= 0")
    return sigmoid(sample_logratio + offset / beta, teacher_logp.detach(), beta=beta)


POINTWISE_LOSSES: Registry[Callable[..., Tensor]] = Registry("pointwise loss")
"""``(logratio[B], label[B] bool, *, offsets and options) -> [B]``; offsets are arguments, never computed inside."""


def pointwise_loss(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Register an unpaired preference loss."""
    return POINTWISE_LOSSES.register(name, aliases=aliases)


def pointwise_row(name: str) -> PreferenceLoss:
    """A point loss as a row like those of the pair table: it reads the only sample of a row, and ``label``."""
    canonical = POINTWISE_LOSSES.canonical(name)
    function = POINTWISE_LOSSES.get(name)
    prepared = tuple(key for key in ("kl", "shift") if key in inspect.signature(function).parameters)

    @functools.wraps(function)
    def on_sample(sample_logratio: Tensor, **rest: Any) -> Tensor:
        return function(sample_logratio, **rest)

    return PreferenceLoss(canonical, on_sample, ("sample_logratio", "label", *prepared), prepared=prepared)


def _labels(logratio: Tensor, label: Tensor) -> Tensor:
    if logratio.dim() != 1 or label.shape != logratio.shape:
        raise ValueError(f"logratio and label have shapes {tuple(logratio.shape)} and {tuple(label.shape)}; both must be [B]")
    if label.dtype != torch.bool and bool(((label != 0) & (label != 1)).any()):
        raise ValueError("label must be true/false or 0/1")
    return label.to(torch.bool)


@pointwise_loss("kto")
def kto(
    logratio: Tensor, label: Tensor, *, kl: Tensor | float = 0.0, beta: float = 0.1, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``lambda_D (1 - sigmoid(b (u - z)))`` where desirable, ``lambda_U (1 - sigmoid(b (z - u)))`` where not.

    ``kl`` = z, detached and clamped at 0. Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.
    """
    _check(beta, logratio)
    good = _labels(logratio, label)
    offset = torch.as_tensor(kl, dtype=logratio.dtype, device=logratio.device).detach().clamp(min=0)
    gap = beta * (logratio - offset)
    return torch.where(good, desirable_weight * (-gap).sigmoid(), undesirable_weight * gap.sigmoid())


@pointwise_loss("bco")
def bco_point(logratio: Tensor, label: Tensor, *, shift: Tensor | float = 0.0, beta: float = 0.1) -> Tensor:
    """``softplus(-(b u - d))`` where desirable, ``softplus(b u - d)`` where not. Jung et al. 2024, arXiv 2404.04656."""
    _check(beta, logratio)
    gap = beta * logratio - torch.as_tensor(shift, dtype=logratio.dtype, device=logratio.device).detach()
    return torch.where(_labels(logratio, label), softplus(-gap), softplus(gap))


@pointwise_loss("apo_zero_unpaired")
def apo_zero_unpaired(logratio: Tensor, label: Tensor, *, beta: float = 0.1) -> Tensor:
    """``1 - sigmoid(b u)`` where desirable, ``sigmoid(b u)`` where not. arXiv 2408.06266."""
    _check(beta, logratio)
    return torch.where(_labels(logratio, label), (-beta * logratio).sigmoid(), (beta * logratio).sigmoid())


def wpo_weights(scores: ActionScores, mask: Tensor | None = None) -> Tensor:
    """Detached weights ``exp(mean_t[log p(y_t) - log sum_v p(v)^2])`` of samples, ``[B]``; a pair's weight is the product.

    Zhou et al. 2024 (WPO), arXiv 2406.11827, equation 5. Needs scores with ``want=("sum_p2",)``. Do not combine with
    losses that sort (``aot``): the weights would belong to other pairs.
    """
    if scores.sum_p2 is None:
        raise ValueError('scores.sum_p2 is missing; compute the scores with want=("sum_p2",)')
    keep = scores.mask if mask is None else mask.to(torch.bool)
    gap = scores.logp.detach() - scores.sum_p2.detach().clamp(min=torch.finfo(scores.sum_p2.dtype).tiny).log()
    return (torch.where(keep, gap, torch.zeros_like(gap)).sum(1) / keep.sum(1).clamp(min=1)).exp()


def clipped_logratio(logp: Tensor, ref_logp: Tensor, *, eps: float) -> Tensor:
    """``log clip(exp(logp - ref_logp), 1 - eps, 1 + eps)``, shape of ``logp``; no gradient outside the range.

    What D3PO (Yang et al. 2023, arXiv 2311.13231) and SPO (Liang et al. 2024, arXiv 2406.04314) hand to
    :func:`sigmoid`. Raises ValueError for ``eps`` outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; it must lie in (0, 1)")
    return (logp - ref_logp).clamp(math.log1p(-eps), math.log1p(eps))


TRL_LOSS_TYPES = {
    "sigmoid": "sigmoid", "sigmoid_norm": "sigmoid_len", "hinge": "hinge", "ipo": "ipo", "exo_pair": "exo", "nca_pair": "nca",
    "robust": "robust", "bco_pair": "bco_pair", "sppo_hard": "sppo_hard", "aot": "aot", "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "sft": "nll",
}
"""``loss_type`` of TRL's DPOConfig -> name here. ``sigmoid_norm`` is length-normalised there, so it is no alias of ours."""
