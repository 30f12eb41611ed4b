"""The composition shared by preference methods of every modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from mmalign.config import bind
from mmalign.core.preference import POINTWISE_LOSSES, PREFERENCE_LOSSES, TRL_LOSS_TYPES
from mmalign.core.registry import Registry
from mmalign.core.supervised import SUPERVISED_LOSSES
from mmalign.data.preference import Examples, RankingPairs, column_names, pairs_of_rankings, rename_absent, unpair
from mmalign.errors import ConfigError, DataError
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts, loss_terms
from mmalign.policies.base import Policy
from mmalign.policies.reference import PrecomputedReference, ReferenceOptions, make_reference
from mmalign.training.checkpoint import atomic_folder, load_state, save_state
from mmalign.training.experience import DatasetExperience
from mmalign.training.objective import LossTerm
from mmalign.training.options import TrainOptions
from mmalign.training.preference import PairOptions, Preference
from mmalign.training.tracking import ProgressBar

Entry = dict[str, Any]
COMPOSITE_LOSSES: Registry[Callable[..., list[Entry]]] = Registry("composite loss")
"""Published losses that are a weighted list of others: ``(*, options) -> entries of losses:``."""


@COMPOSITE_LOSSES.register("rpo", aliases=("irpo",))
def rpo(*, beta: float = 0.1, alpha: float = 1.0) -> list[Entry]:
    """``sigmoid + alpha nll(chosen)``. Pang et al. 2024, arXiv 2404.19733; Liu et al. 2024, arXiv 2405.16436."""
    return [{"name": "sigmoid", "beta": beta}, {"name": "nll", "on": "chosen", "weight": alpha}]


@COMPOSITE_LOSSES.register("mpo")
def mpo(*, beta: float = 0.1, pair: float = 0.8, quality: float = 0.2, generation: float = 1.0) -> list[Entry]:
    """``0.8 sigmoid + 0.2 bco + 1.0 nll(chosen)``: mixed preference optimisation. Wang et al. 2024, arXiv 2411.10442."""
    return [{"name": "sigmoid", "beta": beta, "weight": pair}, {"name": "bco", "beta": beta, "weight": quality},
            {"name": "nll", "on": "chosen", "weight": generation}]


@COMPOSITE_LOSSES.register("orpo")
def orpo(*, beta: float = 0.1) -> list[Entry]:
    """``nll(chosen) + beta odds_ratio``, no reference; beta is the paper's lambda. Hong et al. 2024, arXiv 2403.07691."""
    return [{"name": "nll", "on": "chosen"}, {"name": "odds_ratio", "weight": beta}]


@COMPOSITE_LOSSES.register("cpo_nll")
def cpo_nll(*, beta: float = 0.1, alpha: float = 1.0) -> list[Entry]:
    """``cpo + alpha nll(chosen)``, no reference. Xu et al. 2024, arXiv 2401.08417, equation 5."""
    return [{"name": "cpo", "beta": beta}, {"name": "nll", "on": "chosen", "weight": alpha}]


@COMPOSITE_LOSSES.register("slic_nll")
def slic_nll(*, beta: float = 1.0, alpha: float = 1.0) -> list[Entry]:
    """``slic + alpha nll(gold)``: SLiC-HF with its regulariser on the target. Zhao et al. 2023, arXiv 2305.10425."""
    return [{"name": "slic", "beta": beta}, {"name": "nll", "on": "gold", "weight": alpha}]


@COMPOSITE_LOSSES.register("tpo")
def tpo(*, beta: float = 0.01, alpha: float = 1.0, nll_reduction: str = "token_mean") -> list[Entry]:
    """``cpo + alpha nll(gold)``, no reference: triple preference optimisation. Saeidi et al. 2024, arXiv 2405.16681."""
    return [{"name": "cpo", "beta": beta}, {"name": "nll", "on": "gold", "weight": alpha, "reduction": nll_reduction}]


@COMPOSITE_LOSSES.register("tpo_l")
def tpo_l(*, beta: float = 0.01, gamma: float = 0.5, alpha: float = 1.0, nll_reduction: str = "token_mean") -> list[Entry]:
    """``simpo + alpha nll(gold)``: the length-normalised form of :func:`tpo`, with SimPO's margin gamma."""
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must not be negative")
    return [{"name": "simpo", "beta": beta, "gamma": gamma},
            {"name": "nll", "on": "gold", "weight": alpha, "reduction": nll_reduction}]


@COMPOSITE_LOSSES.register("selm")
def selm(
    *, beta: float = 0.01, alpha: float = 1e-3, scaling: Literal["alpha_beta", "alpha"] = "alpha_beta", base: str = "sigmoid",
    floor: float | None = None,
) -> list[Entry]:
    """``base + alpha beta (log-ratio of the policy's own sample)``. Zhang et al. 2024, arXiv 2405.19332, equation 4.2.

    ``scaling: alpha`` is the factor printed in the paper's algorithm 1; ``floor`` stops the push on a sample whose
    log-ratio has fallen below ``-floor``. Raises ValueError for a negative alpha or an unknown scaling.
    """
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; it must not be negative")
    if scaling not in ("alpha_beta", "alpha"):
        raise ValueError(f"scaling is {scaling!r}; allowed are alpha_beta and alpha")
    weight = alpha * beta if scaling == "alpha_beta" else alpha
    return [{"name": base, "beta": beta}, {"name": "linear", "weight": weight, **({"floor": floor} if floor else {})}]


def expand_composites(losses: list[LossOptions], *, key: str = "losses") -> list[LossOptions]:
    """The list with every composite replaced by its entries, whose weights its own weight multiplies."""
    expanded: list[LossOptions] = []
    for index, option in enumerate(losses):
        if option.name not in COMPOSITE_LOSSES:
            expanded.append(option)
            continue
        function = COMPOSITE_LOSSES.get(option.name)
        try:
            entries = function(**bind(option, function, key=f"{key}[{index}]"))
        except ValueError as error:
            raise ConfigError(f"{key}[{index}]: {error}") from None
        expanded += [LossOptions.model_validate({**entry, "weight": entry.get("weight", 1.0) * option.weight})
                     for entry in entries]
    return expanded


class PreferenceOptions(TrainOptions):
    """Options of methods that learn from pairs. The loss keys of TRL's DPOConfig are understood as well."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "sigmoid", "beta": 0.1})]
    """Pair losses (sigmoid, ipo, hinge, simpo, ...), supervised terms and composites (rpo, orpo, tpo, ...), each with its
    arguments and weight."""
    pairs: PairOptions = PairOptions()
    """What changes the scores or weights of pairs, whatever the loss."""
    reference: ReferenceOptions = ReferenceOptions()
    """The frozen model that log-ratios compare with."""
    rankings: RankingPairs = "best_worst"
    """Which pairs to make of rows that hold a list of ``responses`` with ``scores``: best_worst, adjacent, best_rest, all."""
    column_aliases: ClassVar[dict[str, str]] = {}
    """Other spellings of columns that only this method understands: theirs -> ours."""

    @model_validator(mode="before")
    @classmethod
    def _read_trl_keys(cls, tree: Any) -> Any:
        return from_trl(tree) if isinstance(tree, Mapping) else tree


class UnpairedOptions(TrainOptions):
    """Options of methods that learn from single labelled samples."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "kto", "beta": 0.1})]
    """Point losses (kto, bco, apo_zero_unpaired) and supervised terms, each with its arguments and weight."""
    pairs: PairOptions = PairOptions()
    """Weights of rows."""
    reference: ReferenceOptions = ReferenceOptions()
    """The frozen model that log-ratios compare with."""


_TRL_ARGUMENTS = {"beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "tau", "simpo_gamma": "gamma",
                  "alpha": "alpha"}
_TRL_NODES = {
    "f_divergence_type": ("pairs", "divergence"), "f_alpha_divergence_coef": ("pairs", "divergence_alpha"),
    "ld_alpha": ("pairs", "tail_weight"), "use_weighting": ("pairs", "weights"),
    "precompute_ref_log_probs": ("reference", "kind"), "sync_ref_model": ("reference", "kind"),
    "ref_model_mixup_alpha": ("reference", "alpha"), "ref_model_sync_steps": ("reference", "every"),
}


def from_trl(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose loss is written with the keys of TRL 1.16's DPOConfig, in ours; other keys stay.

    ``loss_type`` (a name or a list), ``loss_weights``, ``beta``, ``label_smoothing``, ``discopop_tau``; the f-divergence,
    LD and weighting keys; the reference keys. Note that ``sigmoid_norm`` is length-normalised there (our sigmoid_len) and
    that label_smoothing acts only in the losses that use it, as in TRL. Raises ConfigError when ``loss_type`` stands
    beside ``losses``.
    """
    tree = dict(tree)
    types, weights = tree.pop("loss_type", None), tree.pop("loss_weights", None)
    given = {ours: tree.pop(theirs) for theirs, ours in _TRL_ARGUMENTS.items() if theirs in tree}
    if types is None and weights is None and not given:
        return _trl_nodes(tree)
    if "losses" in tree:
        raise ConfigError("losses: stands beside TRL's keys (loss_type, loss_weights, beta, ...); use one of the two spellings")
    names = ["sigmoid"] if types is None else [types] if isinstance(types, str) else list(types)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(names) != len(weights):
        raise ConfigError(f"loss_weights: {len(weights)} weights for {len(names)} losses in loss_type")
    entries = []
    for name, weight in zip(names, weights, strict=True):
        if name not in TRL_LOSS_TYPES:
            raise ConfigError(f"loss_type: TRL has no loss {name!r}; allowed are {', '.join(TRL_LOSS_TYPES)}. Our own names go "
                              "into losses")
        ours = TRL_LOSS_TYPES[name]
        table = SUPERVISED_LOSSES if ours in SUPERVISED_LOSSES else PREFERENCE_LOSSES
        row: Any = table.get(ours)
        known = getattr(row, "function", row).__kwdefaults__ or {}
        entry = {"name": ours, "weight": weight, **({"on": "chosen"} if ours == "nll" else {})}
        entries.append(entry | {key: value for key, value in given.items() if key in known})
    return _trl_nodes(tree | {"losses": entries})


def _trl_nodes(tree: dict[str, Any]) -> dict[str, Any]:
    for theirs, (node, key) in _TRL_NODES.items():
        if theirs not in tree:
            continue
        value = tree.pop(theirs)
        if key == "kind" and not value:
            continue
        fixed = {"use_weighting": "wpo" if value else "none", "precompute_ref_log_probs": "precomputed", "sync_ref_model": "sync"}
        tree[node] = {**(tree.get(node) or {}), key: fixed.get(theirs, value)}
    return tree


def preference_terms(options: PreferenceOptions | UnpairedOptions, *, key: str = "losses") -> list[LossTerm]:
    """The checked terms of ``losses:``, composites replaced; raises ConfigError naming the entry."""
    table: Registry[Any] = POINTWISE_LOSSES if isinstance(options, UnpairedOptions) else PREFERENCE_LOSSES
    return loss_terms(expand_composites(options.losses, key=key), [table, SUPERVISED_LOSSES], key=key)


def preference_parts(options: PreferenceOptions, context: BuildContext, policy: Policy) -> TrainingParts:
    """Policy, pair objective and data experience of a preference method."""
    terms = preference_terms(options)
    needed = any(PREFERENCE_LOSSES.get(term.name).reference for term in terms
                 if term.name in PREFERENCE_LOSSES and term.weight != 0)
    return _parts(options, context, policy, terms, needed, unpaired=False)


def unpaired_parts(options: UnpairedOptions, context: BuildContext, policy: Policy) -> TrainingParts:
    """The same on single labelled samples; pairs are taken apart."""
    terms = preference_terms(options)
    if options.reference.kind == "precomputed" and any(term.name == "kto" for term in terms):
        raise ConfigError("reference.kind: precomputed holds scores of the rows alone; kto compares prompts with completions "
                          "of other rows, drawn anew in every update. Use frozen_copy or adapter_off")
    per_process = context.shape.examples_per_update // context.shape.world_size
    if per_process < 2 and any(term.name == "kto" for term in terms):
        raise ConfigError(f"batch.examples_per_update: {per_process} row per process and update; kto compares every prompt with "
                          "the completion of another row, so at least 2 are needed")
    return _parts(options, context, policy, terms, any(term.name in POINTWISE_LOSSES for term in terms), unpaired=True)


def _parts(
    options: PreferenceOptions | UnpairedOptions, context: BuildContext, policy: Policy, terms: list[LossTerm],
    needs_reference: bool, *, unpaired: bool,
) -> TrainingParts:
    reference = make_reference(policy, options.reference) if needs_reference else None
    objective = Preference(policy, terms, reference=reference, pairs=options.pairs, unpaired=unpaired,
                           rows_per_forward=context.shape.examples_per_forward)
    rows = rename_absent(context.rows(options.data), getattr(options, "column_aliases", {}))
    rows = unpair(rows) if isinstance(options, UnpairedOptions) else pairs_of_rankings(rows, options.rankings)
    if not len(rows):
        raise DataError("data: no pair is left: in every ranking all scores are equal")
    missing = [name for name in objective.columns if name not in column_names(rows)]
    if missing:
        raise DataError(f"data: column {missing[0]!r} is missing, which the losses or pairs.* need; columns are "
                        f"{', '.join(column_names(rows))}. Map yours with data.columns")
    examples = context.prepare(policy, rows, fields=objective.prepared_fields)
    if isinstance(reference, PrecomputedReference):
        store_reference_scores(reference, policy, examples, objective, context)
    experience = DatasetExperience(policy, examples, context.shape, seed=context.seed, rank=context.state.rank)
    provenance = {"reference": reference.identity} if reference is not None else {}
    return TrainingParts(policy, objective, experience, rows=len(examples), reference=reference, provenance=provenance)




def store_reference_scores(
    reference: PrecomputedReference, policy: Policy, examples: Examples, objective: Preference, context: BuildContext,
) -> None:
    """Score every sample of the data set with the policy as it is now, once: the first process does and writes them down.

    They are kept in ``<stage folder>/reference``, so a resumed run reads them. Raises ConfigError for policies whose scores
    need noise, which is drawn anew in every update.
    """
    folder = context.folder / "reference"
    with context.accelerator.main_process_first():
        if folder.is_dir():
            state = load_state(folder)["reference"]
            if state["identity"] == reference.identity:
                reference.load_state_dict(state)
                return
        size = context.shape.examples_per_forward
        with ProgressBar("reference scores", len(examples), quiet=context.quiet) as bar:
            for start in range(0, len(examples), size):
                rows = policy.encode_rows([examples[i] for i in range(start, min(start + size, len(examples)))])
                blocks = objective.blocks(rows)
                if start == 0 and policy.draw(blocks, torch.Generator().manual_seed(0)) is not None:
                    raise ConfigError("reference.kind: precomputed holds scores of the rows alone; these depend on noise that is "
                                      "drawn anew in every update. Use frozen_copy or adapter_off")
                reference.precompute(blocks, rows_per_forward=len(blocks))
                bar.update(start + len(rows), {})
        if context.accelerator.is_main_process:
            with atomic_folder(folder) as target:
                save_state(target, {"reference": reference.state_dict()})
