"""References: each kind scores as the model it stands for, moves when it should, and leaves the policy alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_text import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.policies.base import Draw, Scorer
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.modules import adapters_are_identity, adapters_disabled, evaluating, module_identity
from mmalign.policies.reference import Reference, ReferenceOptions, automatic_kind, make_reference

TOKENIZER = tiny_tokenizer()
ROWS = Rows({
    "input_ids": [[7, 8, 9, 10, 11], [7, 8, 9, 12], [13, 14, 15, 16, 17, 18]],
    "labels": [[-100, -100, 9, 10, 11], [-100, -100, 9, 12], [-100, -100, -100, -100, 17, 18]],
})


def adapted(model: Any = None, *, kind: str = "LORA", trained: bool = False, **options: Any) -> Any:
    from peft import PeftType, get_peft_config, get_peft_model

    torch.manual_seed(4)
    defaults: dict[str, Any] = {"LORA": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
                                "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
                                "PROMPT_TUNING": {"num_virtual_tokens": 3}}.get(kind, {})
    config = get_peft_config({"peft_type": PeftType(kind), "task_type": "CAUSAL_LM", **defaults, **options})
    result = get_peft_model(model or tiny_model("llama"), config)
    return shift(result) if trained else result


@torch.no_grad()
def shift(module: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    """What an optimiser does: every trained parameter moves in place."""
    source = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=source) * scale)
    return module


def logp(scorer: Any, rows: Rows = ROWS, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = scorer.log_probs(rows, **options).logp
    return result


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, atol=1e-6)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


KINDS = {
    "frozen_copy": lambda: tiny_model("tied"),
    "frozen_copy of an adapter": lambda: adapted(trained=True),
    "adapter_off": adapted,
    "adapter_ref": lambda: adapted(trained=True),
    "adapter_ref of a prompt": lambda: adapted(kind="PROMPT_TUNING"),
    "adapter_ref of trained biases": lambda: adapted(tiny_model("qwen2"), bias="lora_only", trained=True),
    "precomputed": lambda: tiny_model("llama"),
    "sync": lambda: tiny_model("llama"),
    "ema": adapted,
}


@pytest.mark.parametrize("name", list(KINDS))
def test_is_the_policy_at_first_and_stays_when_it_moves(name: str) -> None:
    kind = name.split()[0]
    policy = CausalLMPolicy(KINDS[name]().train(), TOKENIZER)
    first, identity = logp(policy), policy.identity()
    every = None if kind == "precomputed" else 1000
    reference = make_reference(policy, ReferenceOptions(kind=kind, every=every))  # type: ignore[arg-type]
    assert isinstance(reference, Scorer)
    assert reference is not None
    assert close(logp(reference), first)
    # An adapter at zero adds tensors without changing the function: the base is the reference, and hashes as such.
    assert (reference.identity == identity) == (kind != "adapter_off")
    shift(policy.module)
    before, flags = state_of(policy.module), [p.requires_grad for p in policy.module.parameters()]
    scores = reference.log_probs(ROWS)
    assert close(scores.logp, first)
    assert not scores.logp.requires_grad
    assert not close(logp(policy), first)
    assert torch.equal(scores.mask, policy.action_mask(ROWS))
    assert all(torch.equal(before[key], value) for key, value in policy.module.state_dict().items())
    assert flags == [p.requires_grad for p in policy.module.parameters()]
    assert policy.module.training
    assert all(p.grad is None for p in policy.module.parameters())


def test_scoring_between_forward_and_backward_leaves_the_gradient_alone() -> None:
    for build, kind in ((lambda: tiny_model("tied"), "frozen_copy"), (adapted, "adapter_off"), (adapted, "ema")):
        policy = CausalLMPolicy(build().train(), TOKENIZER)
        reference = make_reference(policy, ReferenceOptions(kind=kind))  # type: ignore[arg-type]
        assert reference is not None
        shift(policy.module)
        gradients = []
        for interrupted in (False, True):
            policy.module.zero_grad()
            scores = policy.log_probs(ROWS)
            if interrupted:
                reference.log_probs(ROWS)
            scores.logp.sum().backward()
            gradients.append([p.grad.clone() for p in policy.module.parameters() if p.grad is not None])
        assert gradients[0]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_off() -> None:
    policy = CausalLMPolicy(tiny_model("gpt2", resid_pdrop=0.5).train(), TOKENIZER)
    reference = make_reference(policy)
    assert torch.equal(logp(reference), logp(reference))


def test_sync_and_ema_arithmetic() -> None:
    for kind, share in (("sync", 0.6), ("ema", 0.25)):
        policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
        start = state_of(policy.module)
        reference = make_reference(policy, ReferenceOptions(kind=kind, alpha=0.6, decay=0.75, every=2))  # type: ignore[arg-type]
        assert reference is not None
        shift(policy.module)
        moved = state_of(policy.module)
        identities = [reference.identity]
        for step in (1, 2, 3):
            reference.after_update(step)
            identities.append(reference.identity)
        assert len(set(identities)) == 2
        assert identities[1] == identities[0]
        target = tiny_model("llama")
        target.load_state_dict({name: (1 - share) * start[name] + share * moved[name] for name in start})
        assert close(logp(reference), logp(CausalLMPolicy(target, TOKENIZER)))


def test_a_hard_sync_is_the_policy() -> None:
    policy = CausalLMPolicy(adapted(trained=True), TOKENIZER)
    reference = make_reference(policy, ReferenceOptions(kind="sync", alpha=1.0, every=1))
    assert reference is not None
    shift(policy.module, seed=3)
    reference.after_update(1)
    assert reference.identity == policy.identity()
    assert torch.equal(logp(reference), logp(policy))


def test_half_precision_averages_are_kept_in_float32() -> None:
    policy = CausalLMPolicy(tiny_model("llama").bfloat16(), TOKENIZER)
    reference = make_reference(policy, ReferenceOptions(kind="ema", decay=0.999))
    assert reference is not None
    start = {name: tensor.clone() for name, tensor in reference.held.items()}  # type: ignore[attr-defined]
    shift(policy.module, 0.01)
    reference.after_update(1)
    moved = [name for name, tensor in reference.held.items() if not torch.equal(tensor, start[name])]  # type: ignore[attr-defined]
    assert len(moved) == len(start)
    assert {p.dtype for p in policy.module.parameters()} == {torch.bfloat16}
    logp(reference)


# -- which kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "kind"), [
    (lambda: tiny_model("llama"), "frozen_copy"),
    (adapted, "adapter_off"),
    (lambda: adapted(kind="IA3"), "adapter_off"),
    (lambda: adapted(kind="LOHA"), "adapter_off"),
    (lambda: adapted(use_dora=True), "adapter_off"),
    (lambda: adapted(modules_to_save=["lm_head"]), "adapter_off"),
    (lambda: adapted(trained=True), "adapter_ref"),
    (lambda: adapted(kind="IA3", trained=True), "adapter_ref"),
    (lambda: adapted(init_lora_weights="pissa"), "adapter_ref"),
    (lambda: adapted(tiny_model("qwen2"), bias="lora_only"), "adapter_ref"),
    (lambda: adapted(kind="PROMPT_TUNING"), "adapter_ref"),
])
def test_automatic_kind_equals_the_policy(build: Any, kind: str) -> None:
    policy = CausalLMPolicy(build(), TOKENIZER)
    assert automatic_kind(policy.module) == kind
    reference = make_reference(policy)
    assert reference is not None
    assert reference.kind == kind
    assert close(logp(reference), logp(policy))


def test_none_and_refusals(caplog: pytest.LogCaptureFixture) -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    assert make_reference(policy, ReferenceOptions(kind="none")) is None
    for kind in ("adapter_off", "adapter_ref"):
        with pytest.raises(ConfigError, match=f"{kind} needs a policy with an adapter"):
            make_reference(policy, ReferenceOptions(kind=kind))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="outside the adapter"):
        make_reference(CausalLMPolicy(adapted(tiny_model("qwen2"), bias="all"), TOKENIZER), ReferenceOptions(kind="adapter_off"))
    make_reference(CausalLMPolicy(adapted(trained=True), TOKENIZER), ReferenceOptions(kind="adapter_off"))
    assert "the adapter is not at zero" in caplog.text
    for bad in ({"alpha": 0.0}, {"decay": 1.0}, {"every": 0}, {"kind": "frozen"}):
        with pytest.raises(ValueError):
            ReferenceOptions(**bad)  # type: ignore[arg-type]


def test_a_given_scorer_must_be_another_model() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    for same in (policy, CausalLMPolicy(policy.module, TOKENIZER)):
        with pytest.raises(ConfigError, match="the policy itself"):
            make_reference(policy, scorer=same)
    other = CausalLMPolicy(tiny_model("llama", seed=9), TOKENIZER)
    reference = make_reference(policy, scorer=other)
    assert reference is not None
    assert reference.identity == other.identity()
    assert torch.equal(logp(reference), logp(other))


def test_an_adapter_injected_later_is_noticed() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    reference = make_reference(policy)
    policy.replace_module(adapted(policy.module))
    with pytest.raises(ConfigError, match="after adapters are injected"):
        logp(reference)


# -- precomputed ---------------------------------------------------------------------------------------------------


def test_precomputed_scores_do_not_depend_on_batching_and_close_with_the_first_update() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    first = logp(policy)
    reference: Any = make_reference(policy, ReferenceOptions(kind="precomputed"))
    reference.precompute(ROWS, rows_per_forward=2)
    reference.after_update(1)
    shift(policy.module)
    assert close(logp(reference), first)
    again = logp(reference, ROWS.take([2, 0]).with_columns(advantages=torch.zeros(2)))
    assert close(again, first[[2, 0]][:, : again.shape[1]])
    with pytest.raises(DataError, match="1 of 2 rows have no precomputed"):
        logp(reference, Rows({"input_ids": [[7, 8, 9, 12], [7, 8]], "labels": [[-100, -100, 9, 12], [-100, 8]]}))
    with pytest.raises(DataError, match="no precomputed"):
        logp(reference, temperature=0.5)
    with pytest.raises(ConfigError, match="entropy"):
        reference.log_probs(ROWS, want=("entropy",))

    restored: Any = make_reference(CausalLMPolicy(shift(tiny_model("llama")), TOKENIZER), ReferenceOptions(kind="precomputed"))
    restored.load_state_dict(reference.state_dict())
    assert close(logp(restored), first)
    assert restored.identity == reference.identity


# -- state ---------------------------------------------------------------------------------------------------------


def test_state_restores_moving_references_and_checks_frozen_ones() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    moving: Any = make_reference(policy, ReferenceOptions(kind="ema", decay=0.5))
    frozen: Any = make_reference(policy, ReferenceOptions(kind="frozen_copy"))
    shift(policy.module)
    moving.after_update(1)
    expected = logp(moving)

    resumed = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    again: Any = make_reference(resumed, ReferenceOptions(kind="ema", decay=0.5))
    again.load_state_dict(moving.state_dict())
    assert torch.equal(logp(again), expected)
    same: Any = make_reference(resumed, ReferenceOptions(kind="frozen_copy"))
    same.load_state_dict(frozen.state_dict())
    with pytest.raises(CheckpointError, match="kind 'frozen_copy'"):
        again.load_state_dict(frozen.state_dict())
    other: Any = make_reference(CausalLMPolicy(tiny_model("llama", seed=1), TOKENIZER), ReferenceOptions(kind="frozen_copy"))
    with pytest.raises(CheckpointError, match="other weights"):
        other.load_state_dict(frozen.state_dict())
    small: Any = make_reference(CausalLMPolicy(tiny_model("tied"), TOKENIZER), ReferenceOptions(kind="ema"))
    with pytest.raises(CheckpointError, match="other parameters"):
        small.load_state_dict(moving.state_dict())


# -- any modality --------------------------------------------------------------------------------------------------


class NoiseScorer:
    """A scorer with a draw, as diffusion policies are: ``-(f(x + noise) - x)^2`` per row."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def action_mask(self, rows: Rows) -> Tensor:
        return torch.ones(len(rows), 1, dtype=torch.bool)

    def draw(self, rows: Rows, generator: torch.Generator) -> Draw:
        return Draw(torch.randint(10, (len(rows),), generator=generator), torch.randn(len(rows), 3, 4, 4, generator=generator))

    def log_probs(self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Any = ()) -> ActionScores:
        assert draw is not None
        predicted = self.module(rows["latents"] + draw.noise)
        error = (predicted - rows["latents"]).square().mean((1, 2, 3))
        return ActionScores(logp=-error[:, None], mask=self.action_mask(rows))


def conv_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Conv2d(6, 3, 1)).train()


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("kind", ["auto", "precomputed", "ema", "sync"])
def test_scorers_with_draws(injected: bool, kind: str) -> None:
    module = conv_module()
    if injected:
        from peft import LoraConfig, inject_adapter_in_model

        for parameter in module.parameters():
            parameter.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "3"]), module)
    scorer: Any = NoiseScorer(module)
    rows = Rows({"latents": torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))})
    draw = scorer.draw(rows, torch.Generator().manual_seed(2))
    with evaluating(module):
        first = logp(scorer, rows, draw=draw)
    every = None if kind == "precomputed" else 100
    reference: Any = make_reference(scorer, ReferenceOptions(kind=kind, every=every))  # type: ignore[arg-type]
    if kind == "auto":
        assert reference.kind == ("adapter_off" if injected else "frozen_copy")
    if kind == "precomputed":
        reference.precompute(rows, draw=draw)
    shift(module)
    module(rows["latents"])  # batch statistics move as well
    if not injected:
        assert int(module[1].num_batches_tracked) == 1
    if kind == "auto" and injected:
        module[1].reset_running_stats()  # adapter_off shares everything outside the adapters
    reference.after_update(1)
    assert close(logp(reference, rows, draw=draw), first)
    with evaluating(module):
        assert not close(logp(scorer, rows, draw=draw), first)


def test_adapters_disabled_on_a_diffusers_model() -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4)
    base_identity = module_identity(unet)
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 6)
    with torch.no_grad():
        base = unet(x, 3, text).sample
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        assert adapters_are_identity(unet)
        shift(unet)
        assert not adapters_are_identity(unet)
        assert not torch.equal(unet(x, 3, text).sample, base)
        with adapters_disabled(unet):
            assert torch.equal(unet(x, 3, text).sample, base)
            assert module_identity(unet) == base_identity
        assert not torch.equal(unet(x, 3, text).sample, base)
    assert module_identity(unet) != base_identity


def test_identity_of_the_base_is_the_same_with_and_without_adapters() -> None:
    for kind in ("LORA", "PROMPT_TUNING"):
        identity = module_identity(tiny_model("tied"))
        model = adapted(tiny_model("tied"), kind=kind)
        assert module_identity(model) != identity
        with adapters_disabled(model):
            assert module_identity(model) == identity
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1.0)
        with adapters_disabled(model):
            assert module_identity(model) == identity


def test_adapters_disabled_keeps_frozen_adapters_frozen() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with adapters_disabled(model):
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_references_share_nothing_with_the_policy() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    reference: Any = make_reference(policy)
    own = {p.data_ptr() for p in policy.module.parameters()}
    assert not own & {t.data_ptr() for t in reference.held.values()}
    logp(reference)
    assert own == {p.data_ptr() for p in policy.module.parameters()}


def test_base_class_scores_the_policy_as_it_is() -> None:
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER)
    reference = Reference(policy)
    assert torch.equal(logp(reference), logp(policy))
    assert reference.draw(ROWS, torch.Generator()) is None
