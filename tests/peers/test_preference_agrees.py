"""Pair losses: our objective against TRL's DPOTrainer, its experimental CPO and ORPO trainers, and KTO."""

from __future__ import annotations

import pytest
import torch
from trl_peers import (
    PAIRS,
    arguments,
    as_messages,
    assert_close,
    assert_same_gradients,
    dataset,
    encoded,
    load_model,
    load_policy,
    our_loss,
    tokenizer,
)

from mmalign.core.preference import PREFERENCE_LOSSES, TRL_LOSS_TYPES
from mmalign.data.rows import Rows
from mmalign.methods.preference import COMPOSITE_LOSSES
from mmalign.policies.reference import make_reference
from mmalign.training.objective import LossTerm, TrainState, UpdateBatch
from mmalign.training.preference import PairOptions, Preference

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer

NOISE = 0.02
"""Distance of the policy from the reference: without it every log-ratio is 0 and most losses are constants."""
BETA = 0.3
FIELDS = ("chosen", "rejected")

OPTIONS = {
    "robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}, "aot": {"label_smoothing": 0.05},
    "aot_unpaired": {"label_smoothing": 0.05}, "discopop": {"tau": 0.05},
}


@pytest.fixture(scope="module", params=["plain", "conversation"])
def rows(request):
    return PAIRS if request.param == "plain" else [as_messages(row) for row in PAIRS]


@pytest.fixture(scope="module")
def trainer(model_folder, rows, tmp_path_factory):
    # The weights of WPO need a further output of the head, which is chosen when the trainer is made.
    config = trl.DPOConfig(**arguments(tmp_path_factory.mktemp("dpo"), len(rows)), train_sampling_strategy="sequential",
                           use_weighting=True)
    return trl.DPOTrainer(load_model(model_folder, noise=NOISE), ref_model=load_model(model_folder), args=config,
                          train_dataset=dataset(rows), processing_class=tokenizer(model_folder))


def their_loss(trainer, loss_types, weights=None, **options):
    """TRL's own loss with other settings on the same trainer, model and batch."""
    trainer.loss_types, trainer.loss_weights = loss_types, weights or [1.0] * len(loss_types)
    trainer.beta = options.get("beta", BETA)
    trainer.label_smoothing, trainer.args.discopop_tau = options.get("label_smoothing", 0.0), options.get("tau", 0.05)
    trainer.f_divergence_type, trainer.ld_alpha = options.get("f_divergence", "reverse_kl"), options.get("ld_alpha")
    trainer.use_weighting = options.get("use_weighting", False)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.model.zero_grad()
    return trainer.compute_loss(trainer.model, batch)


def our_objective(folder, losses, rows, *, layout="auto", **pairs):
    """Our objective and rows: the policy moved away from the reference, which keeps the weights of the folder."""
    conversation = not isinstance(rows[0]["prompt"], str)
    policy = load_policy(folder, noise=NOISE, layout=layout, train_on_separator=conversation)
    reference = make_reference(policy, scorer=load_policy(folder, layout=layout))
    return policy, Preference(policy, losses, reference=reference, pairs=PairOptions(**pairs)), encoded(policy, rows, FIELDS)


@pytest.mark.parametrize("name", sorted(set(TRL_LOSS_TYPES) - {"sft"}))
def test_every_loss_type_of_trl(trainer, model_folder, rows, name):
    options = OPTIONS.get(name, {})
    theirs = their_loss(trainer, [name], **options)
    _, objective, ours = our_objective(model_folder, [LossTerm(TRL_LOSS_TYPES[name], {"beta": BETA, **options})], rows)
    value = our_loss(objective, ours)
    assert_close(value, theirs)
    row = PREFERENCE_LOSSES.get(TRL_LOSS_TYPES[name])
    untrained = float(row.function(*(torch.zeros(1) for _ in row.inputs), beta=BETA, **options))
    assert float(value.detach()) != pytest.approx(untrained, rel=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot"])
def test_gradients_of_every_parameter(trainer, model_folder, rows, name, layout):
    options = OPTIONS.get(name, {})
    their_loss(trainer, [name], **options).backward()
    policy, objective, ours = our_objective(
        model_folder, [LossTerm(TRL_LOSS_TYPES[name], {"beta": BETA, **options})], rows, layout=layout)
    our_loss(objective, ours).backward()
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


@pytest.mark.parametrize("name", sorted(set(TRL_LOSS_TYPES) - {"sft", "sigmoid", "ipo", "aot"}))
def test_gradients_of_the_other_loss_types(trainer, model_folder, rows, name):
    options = OPTIONS.get(name, {})
    their_loss(trainer, [name], **options).backward()
    policy, objective, ours = our_objective(model_folder, [LossTerm(TRL_LOSS_TYPES[name], {"beta": BETA, **options})], rows)
    our_loss(objective, ours).backward()
    assert_same_gradients(policy.module, trainer.model, relative=2e-5)


def test_weighted_lists_of_losses(trainer, model_folder, rows):
    """RPO (sigmoid + nll) and MPO (sigmoid + bco + nll)."""
    for types, weights in ((["sigmoid", "sft"], [1.0, 0.7]), (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])):
        theirs = their_loss(trainer, types, weights)
        terms = [LossTerm(TRL_LOSS_TYPES[t], {} if t == "sft" else {"beta": BETA}, weight, on="chosen" if t == "sft" else None)
                 for t, weight in zip(types, weights, strict=True)]
        _, objective, ours = our_objective(model_folder, terms, rows)
        assert_close(our_loss(objective, ours), theirs)


def test_micro_batches_give_the_gradient_of_the_whole_update(trainer, model_folder, rows):
    theirs = their_loss(trainer, ["sigmoid", "sft"], [1.0, 0.5])
    terms = [LossTerm("sigmoid", {"beta": BETA}), LossTerm("nll", {}, 0.5, on="chosen")]
    _, objective, ours = our_objective(model_folder, terms, rows)
    assert_close(our_loss(objective, ours, micro_batches=3), theirs)


def test_weights_of_wpo(trainer, model_folder, rows):
    theirs = their_loss(trainer, ["sigmoid"], use_weighting=True)
    _, objective, ours = our_objective(model_folder, [LossTerm("sigmoid", {"beta": BETA})], rows, weights="wpo")
    assert_close(our_loss(objective, ours), theirs)


@pytest.mark.parametrize("tail", [0.0, 0.4])
def test_length_desensitised_log_probs(trainer, model_folder, rows, tail):
    theirs = their_loss(trainer, ["sigmoid"], ld_alpha=tail)
    _, objective, ours = our_objective(model_folder, [LossTerm("sigmoid", {"beta": BETA})], rows, tail_weight=tail)
    assert_close(our_loss(objective, ours), theirs)


@pytest.mark.parametrize(("theirs_kind", "kind"), [
    ("forward_kl", "forward_kl"), ("js_divergence", "js"), ("alpha_divergence", "alpha"),
])
def test_other_divergences_than_the_reverse(trainer, model_folder, rows, theirs_kind, kind):
    trainer.f_alpha_divergence_coef = 0.4
    theirs = their_loss(trainer, ["sigmoid"], f_divergence=theirs_kind)
    _, objective, ours = our_objective(
        model_folder, [LossTerm("sigmoid", {"beta": BETA})], rows, divergence=kind, divergence_alpha=0.4)
    assert_close(our_loss(objective, ours), theirs)


# -- without a reference: CPO, SimPO, AlphaPO, ORPO ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpo(model_folder, tmp_path_factory):
    module = pytest.importorskip("trl.experimental.cpo")
    config = module.CPOConfig(**arguments(tmp_path_factory.mktemp("cpo"), len(PAIRS)), max_length=256)
    return module.CPOTrainer(load_model(model_folder), args=config, train_dataset=dataset(PAIRS),
                             processing_class=tokenizer(model_folder))


@pytest.mark.parametrize(("settings", "terms"), [
    ({"loss_type": "sigmoid", "cpo_alpha": 0.7}, [LossTerm("cpo", {"beta": BETA}), LossTerm("nll", {}, 0.7, on="chosen")]),
    ({"loss_type": "hinge", "cpo_alpha": 0.0}, [LossTerm("slic", {"beta": BETA})]),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}, [LossTerm("simpo", {"beta": BETA, "gamma": 0.4})]),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "alpha": 0.3},
     [LossTerm("alphapo", {"beta": BETA, "gamma": 0.4, "alpha": 0.3})]),
], ids=["cpo", "slic", "simpo", "alphapo"])
def test_reference_free_losses(cpo, model_folder, settings, terms):
    for name, value in {"alpha": 0.0, "simpo_gamma": 0.5, **settings, "beta": BETA, "label_smoothing": 0.0}.items():
        setattr(cpo, name, value)
    batch = in_order(cpo)
    theirs = cpo.compute_loss(cpo.model, batch)
    policy = load_policy(model_folder)
    ours = our_loss(Preference(policy, terms), rows_of(batch))
    assert_close(ours, theirs)


def test_odds_ratio_of_orpo(model_folder, tmp_path):
    module = pytest.importorskip("trl.experimental.orpo")
    config = module.ORPOConfig(**arguments(tmp_path, len(PAIRS)), max_length=256, beta=0.2)
    trainer = module.ORPOTrainer(load_model(model_folder), args=config, train_dataset=dataset(PAIRS),
                                 processing_class=tokenizer(model_folder))
    batch = in_order(trainer)
    theirs = trainer.compute_loss(trainer.model, batch)
    policy = load_policy(model_folder)
    rows = rows_of(batch)
    pair = our_loss(Preference(policy, [LossTerm("odds_ratio", {}, 0.2)]), rows)
    # TRL's ORPO takes the likelihood of the prompt as well, so that term is computed on rows labelled throughout.
    whole = rows.with_columns(chosen_labels=[[-100, *ids[1:]] for ids in rows["chosen_input_ids"]])
    likelihood = our_loss(Preference(policy, [LossTerm("nll", {}, on="chosen")]), whole)
    assert_close(pair + likelihood, theirs)


def in_order(trainer):
    """The whole data set as one collated batch, in its own order."""
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]))


def rows_of(batch):
    """The rows of a collated batch of the experimental trainers, which tokenise in their own way."""
    columns = {}
    for field in FIELDS:
        sizes = batch[f"{field}_attention_mask"].sum(1).tolist()
        for name in (f"{field}_input_ids", f"{field}_labels"):
            columns[name] = [row[:size].tolist() for row, size in zip(batch[name], sizes, strict=True)]
    return Rows(columns)


# -- unpaired ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired_losses(model_folder, tmp_path, name):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"] if good else row["rejected"], "label": good}
            for row, good in zip(PAIRS, (True, False, True, False), strict=True)]
    config = trl.KTOConfig(**arguments(tmp_path, len(rows)), beta=BETA, loss_type=name, desirable_weight=1.3,
                           undesirable_weight=0.9, train_sampling_strategy="sequential")
    trainer = trl.KTOTrainer(load_model(model_folder, noise=NOISE), ref_model=load_model(model_folder), args=config,
                             train_dataset=dataset(rows), processing_class=tokenizer(model_folder))
    batch = in_order(trainer)
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)

    policy = load_policy(model_folder, noise=NOISE)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.9} if name == "kto" else {}
    objective = Preference(policy, [LossTerm(name, {"beta": BETA, **weights})], unpaired=True, rows_per_forward=3,
                           reference=make_reference(policy, scorer=load_policy(model_folder)),
                           pairs=PairOptions(weights="none" if weights else "column"))
    ours = encoded(policy, rows).with_columns(label=[row["label"] for row in rows],
                                              weight=[1.3 if row["label"] else 0.9 for row in rows])
    assert_close(our_loss(objective, ours, micro_batches=2), theirs)
    if name == "kto":
        assert objective.prepare(UpdateBatch({"train": ours}), TrainState(0, 1))["kl/kto"] > 0  # else its test is empty


def test_triples(model_folder, tmp_path):
    """TPO and TPO-L of TRL's experimental trainer: a reference-free pair term plus the likelihood of a third sample."""
    module = pytest.importorskip("trl.experimental.tpo")
    rows = [{**row, "reference": row["chosen"] + " indeed"} for row in PAIRS]
    config = module.TPOConfig(**arguments(tmp_path, len(rows)), max_length=256, beta=BETA, tpo_alpha=0.6)
    trainer = module.TPOTrainer(load_model(model_folder), args=config, train_dataset=dataset(rows),
                                processing_class=tokenizer(model_folder))
    batch = in_order(trainer)
    policy = load_policy(model_folder)
    encoded_rows = encoded(policy, [{**row, "gold": row["reference"]} for row in rows], ("chosen", "rejected", "gold"))
    for name, options in (("sigmoid", {}), ("tpo-l", {"gamma": 0.4})):
        trainer.loss_type, trainer.tpo_l_gamma = name, options.get("gamma", 0.0)
        theirs = trainer.compute_loss(trainer.model, batch)
        entries = COMPOSITE_LOSSES.get("tpo_l" if options else "tpo")(beta=BETA, alpha=0.6, **options)
        terms = [LossTerm(entry.pop("name"), {k: v for k, v in entry.items() if k in ("beta", "gamma")},
                          entry.get("weight", 1.0), on=entry.get("on")) for entry in entries]
        assert_close(our_loss(Preference(policy, terms), encoded_rows), theirs)
