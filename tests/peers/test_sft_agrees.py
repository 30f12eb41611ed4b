"""Supervised losses: our objective against TRL's SFTTrainer, tokens, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from trl_peers import (
    COMPLETIONS,
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

from mmalign.training.objective import LossTerm, Supervised

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer

END = 2
"""Id of the end-of-turn token."""


@pytest.fixture(params=["plain", "conversation"])
def rows(request):
    return COMPLETIONS if request.param == "plain" else [as_messages(row) for row in COMPLETIONS]


@pytest.fixture
def trainer(model_folder, rows, tmp_path):
    config = trl.SFTConfig(**arguments(tmp_path, len(rows)), shuffle_dataset=False, train_sampling_strategy="sequential")
    return trl.SFTTrainer(load_model(model_folder), args=config, train_dataset=dataset(rows),
                          processing_class=tokenizer(model_folder))


def batch_of(trainer):
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    return batch


def test_tokens_and_labels_are_the_same(trainer, model_folder, rows):
    batch = batch_of(trainer)
    ours = encoded(load_policy(model_folder), rows)
    for row in range(len(rows)):
        size = int(batch["attention_mask"][row].sum())
        labels = batch["labels"][row, :size].tolist()
        assert ours["input_ids"][row] == batch["input_ids"][row, :size].tolist()
        # Both learn the completion and its end token; the white space that a template writes after it is never generated,
        # and ours leaves it out.
        learned = [i for i, label in enumerate(ours["labels"][row]) if label != -100]
        assert learned == [i for i, label in enumerate(labels) if label != -100 and not after_the_end(labels, i)]


def after_the_end(labels: list[int], position: int) -> bool:
    ends = [i for i, label in enumerate(labels) if label == END]
    return bool(ends) and position > ends[-1]


@pytest.mark.parametrize("loss", ["nll", "dft"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_losses_and_gradients_are_the_same(trainer, model_folder, rows, loss, layout):
    conversation = not isinstance(rows[0]["prompt"], str)
    trainer.args.loss_type = loss
    batch = batch_of(trainer)
    count = (batch["labels"][:, 1:] != -100).sum()
    theirs = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    theirs.backward()
    policy = load_policy(model_folder, layout=layout, train_on_separator=conversation)
    ours = our_loss(Supervised(policy, [LossTerm(loss)]), encoded(policy, rows))
    ours.backward()
    assert_close(ours, theirs)
    assert_same_gradients(policy.module, trainer.model)


@pytest.mark.parametrize("rows", ["plain"], indirect=True)
def test_micro_batches_divide_by_the_tokens_of_the_whole_update(trainer, model_folder, rows):
    batch = batch_of(trainer)
    count = (batch["labels"][:, 1:] != -100).sum()
    theirs = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    policy = load_policy(model_folder)
    assert_close(our_loss(Supervised(policy, [LossTerm("nll")]), encoded(policy, rows), micro_batches=3), theirs)


def test_text_rows_learn_every_token(model_folder, tmp_path):
    texts = [{"text": row["prompt"] + row["completion"]} for row in COMPLETIONS]
    config = trl.SFTConfig(**arguments(tmp_path, len(texts)), shuffle_dataset=False, train_sampling_strategy="sequential")
    trainer = trl.SFTTrainer(load_model(model_folder), args=config, train_dataset=dataset(texts),
                             processing_class=tokenizer(model_folder))
    batch = batch_of(trainer)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    policy = load_policy(model_folder)
    with torch.no_grad():
        assert_close(our_loss(Supervised(policy), encoded(policy, texts)), theirs)
