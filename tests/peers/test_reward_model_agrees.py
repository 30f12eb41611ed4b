"""Reward models: loss, gradient and scores agree with TRL's RewardTrainer on the same model and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl_peers import PAIRS, arguments, as_messages, assert_close, assert_same_gradients, dataset, encoded, our_loss

from mmalign.data.chat import TextEncoding
from mmalign.policies.reward_lm import RewardPolicy
from mmalign.training.objective import LossTerm
from mmalign.training.preference import Preference

pytest.importorskip("trl")


def classifier(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(4))
    return model


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize(("margin", "centre"), [(False, None), (True, None), (False, 0.05), (True, 0.05)])
def test_loss_and_gradient_of_the_reward_trainer(
    model_folder: Path, tmp_path: Path, form: str, margin: bool, centre: float | None,
) -> None:
    from trl import RewardConfig, RewardTrainer

    rows: list[dict[str, Any]] = [dict(row) if form == "text" else as_messages(row) for row in PAIRS]
    if margin:
        rows = [{**row, "margin": 0.3 * i} for i, row in enumerate(rows)]
    config = RewardConfig(**arguments(tmp_path, len(rows)), max_length=256, center_rewards_coefficient=centre)
    trainer = RewardTrainer(classifier(model_folder), args=config, train_dataset=dataset(rows),
                            processing_class=tokenizer(model_folder))
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))]))
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    policy = RewardPolicy(classifier(model_folder), tokenizer(model_folder), encoding=TextEncoding(max_length=256))
    ours_rows = encoded(policy, rows, ("chosen", "rejected"))  # type: ignore[arg-type]
    name = "bt_reward_margin" if margin else "bt_reward"
    objective = Preference(policy, [LossTerm(name, {"center_coef": centre or 0.0})])
    ours = our_loss(objective, ours_rows, micro_batches=3)
    ours.backward()
    assert_close(ours, theirs)
    assert_same_gradients(policy.module, trainer.model)


def test_a_model_of_the_reward_trainer_is_a_reward_here(model_folder: Path, tmp_path: Path) -> None:
    """A folder written by transformers: the reward gives the logits of its own forward, whatever the batch."""
    from mmalign.rewards.learned import RewardModel

    model, words = classifier(model_folder), tokenizer(model_folder)
    model.config.pad_token_id = words.pad_token_id
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), rows_per_forward=3)
    found = reward([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])
    with torch.no_grad():
        alone = [model.eval()(torch.tensor([words(row["prompt"] + row["chosen"] + words.eos_token)["input_ids"]])).logits.item()
                 for row in PAIRS]
    torch.testing.assert_close(found, torch.tensor(alone), rtol=1e-5, atol=1e-6)
