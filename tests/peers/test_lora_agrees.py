"""Adapters: our tuning mode against peft itself, and one DPO step on an adapter against TRL's."""

from __future__ import annotations

import pytest
import torch
from trl_peers import (
    COMPLETIONS,
    PAIRS,
    arguments,
    assert_close,
    assert_same_gradients,
    dataset,
    encoded,
    load_model,
    load_policy,
    our_loss,
    tokenizer,
)

from mmalign.core.seeding import derive_seed
from mmalign.policies.reference import make_reference
from mmalign.training.objective import LossTerm, Supervised
from mmalign.training.preference import Preference
from mmalign.training.tuning import TuningOptions, make_tuning

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peer

SEED = 3
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
LOHA = {"r": 2, "target_modules": ["q_proj"]}


def adapted_policy(folder, name="lora", **options):
    policy = load_policy(folder)
    make_tuning(TuningOptions(name=name, **options)).apply(policy, seed=SEED)
    return policy


def adapted_model(folder, config):
    """The same base with an adapter of peft's own making, drawn from the same seed as ours."""
    model = load_model(folder)
    torch.manual_seed(derive_seed(SEED, "init", "adapter"))
    return peft.get_peft_model(model, config)


@torch.no_grad()
def shake(module, size=0.05):
    """Move the adapter off zero, the same way on both sides."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


CONFIGS = {
    "lora": (LORA, lambda: peft.LoraConfig(task_type="CAUSAL_LM", **LORA)),
    "dora": (LORA, lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **LORA)),
    "rslora": (LORA, lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_rslora=True, **LORA)),
    "ia3": ({}, lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "loha": (LOHA, lambda: peft.LoHaConfig(task_type="CAUSAL_LM", **LOHA)),
    "prompt": ({"num_virtual_tokens": 3}, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix": ({"num_virtual_tokens": 3}, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_adapters_are_those_of_peft(model_folder, name):
    options, config = CONFIGS[name]
    policy, model = adapted_policy(model_folder, name, **options), adapted_model(model_folder, config())
    ours, theirs = (dict(m.named_parameters()) for m in (policy.module, model))
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        assert parameter.requires_grad == ours[key].requires_grad, key
        assert torch.equal(parameter, ours[key]), key
    shake(policy.module)
    shake(model)
    rows = encoded(policy, COMPLETIONS)
    loss = our_loss(Supervised(policy), rows)
    loss.backward()
    total = sum(
        -torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) : -1], -1)
        .gather(1, torch.tensor(ids)[1:, None]).squeeze(1)[torch.tensor(labels)[1:] != -100].sum()
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    )
    count = sum(label != -100 for labels in rows["labels"] for label in labels)
    (total / count).backward()
    assert_close(loss, total / count)
    assert_same_gradients(policy.module, model, relative=5e-5)


@pytest.mark.parametrize("trained_before", [False, True], ids=["new adapter", "adapter trained before"])
def test_one_dpo_step_on_an_adapter(model_folder, tmp_path, trained_before):
    trl = pytest.importorskip("trl")
    model = adapted_model(model_folder, CONFIGS["lora"][1]())
    policy = adapted_policy(model_folder, **LORA)
    if trained_before:
        shake(model)
        shake(policy.module)
    reference = make_reference(policy)
    assert reference.kind == ("adapter_ref" if trained_before else "adapter_off")
    config = trl.DPOConfig(**arguments(tmp_path, len(PAIRS)), train_sampling_strategy="sequential", beta=0.3)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=dataset(PAIRS), processing_class=tokenizer(model_folder))
    # The reference is fixed on both sides by now; the policies move away from it, so that the loss is not log 2.
    for module in (trainer.model, policy.module):
        shake_adapter(module)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    ours = our_loss(Preference(policy, [LossTerm("sigmoid", {"beta": 0.3})], reference=reference),
                    encoded(policy, PAIRS, ("chosen", "rejected")))
    ours.backward()
    assert abs(float(ours.detach()) - 0.6931) > 1e-3
    assert_close(ours, theirs)
    for name, parameter in dict(trainer.model.named_parameters()).items():
        if ".ref." in name:
            parameter.requires_grad_(False)
    assert_same_gradients(policy.module, trainer.model, relative=5e-5)


@torch.no_grad()
def shake_adapter(module):
    generator = torch.Generator().manual_seed(9)
    for name, parameter in sorted(module.named_parameters()):
        if ".default." in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
