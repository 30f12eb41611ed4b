"""References from checkpoints and moving averages: soup, iterate, bema."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_text import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.modules import evaluating, module_identity
from mmalign.policies.provenance import write_provenance
from mmalign.policies.reference import ReferenceOptions, average_checkpoints, make_reference

TOKENIZER = tiny_tokenizer()
ROWS = Rows({
    "input_ids": [[7, 8, 9, 10, 11], [7, 8, 9, 12]], "labels": [[-100, -100, 9, 10, 11], [-100, -100, 9, 12]],
})


def policy_of(model: Any) -> CausalLMPolicy:
    return CausalLMPolicy(model, TOKENIZER)


def saved(folder: Path, seed: int, kind: str = "llama", **changes: Any) -> str:
    policy_of(tiny_model(kind, seed=seed, **changes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> list[str]:
    root = tmp_path_factory.mktemp("pair")
    return [saved(root / str(seed), seed) for seed in (1, 2)]


def soup(policy: Any, checkpoints: list[str], weights: list[float] | None = None, **options: Any) -> Any:
    return make_reference(policy, ReferenceOptions(kind="soup", checkpoints=checkpoints, weights=weights, **options))


def logp(scorer: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = scorer.log_probs(ROWS).logp
    return result


@torch.no_grad()
def shift(module: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    source = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=source) * scale)


# -- soup ----------------------------------------------------------------------------------------------------------


def test_soup_is_the_weighted_average_and_leaves_the_policy_alone(pair: list[str]) -> None:
    policy = policy_of(tiny_model("llama", seed=1))
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    reference = soup(policy, pair, [0.25, 0.75])
    merged = tiny_model("llama")
    states = [load_file(Path(folder) / "model.safetensors") for folder in pair]
    merged.load_state_dict({name: 0.25 * states[0][name] + 0.75 * states[1][name] for name in states[0]})
    torch.testing.assert_close(logp(reference), logp(policy_of(merged)), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.module.state_dict().items())
    assert not torch.allclose(logp(reference), logp(policy))
    shift(policy.module)
    torch.testing.assert_close(logp(reference), logp(policy_of(merged)), rtol=1e-5, atol=1e-6)
    assert not reference.moving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soup_of_copies_of_one_model_is_that_model_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("tied", seed=3).to(dtype)
    policy_of(model).save_pretrained(tmp_path)
    for weights in (None, [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        reference = soup(policy_of(tiny_model("tied").to(dtype)), [str(tmp_path)] * 3, weights)
        assert reference.identity == module_identity(model)


def test_half_precision_checkpoints_are_rounded_once(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        policy_of(tiny_model("llama", seed=seed).bfloat16()).save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    states = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    held = soup(policy_of(tiny_model("llama").bfloat16()), folders).held
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(held[name], ((states[0][name].float() + states[1][name].float()) / 2).bfloat16())
    # A float32 policy keeps what bfloat16 would round away.
    wide = soup(policy_of(tiny_model("llama")), folders).held[name]
    assert torch.equal(wide, (states[0][name].float() + states[1][name].float()) / 2)


def adapter_folder(folder: Path, seed: int, base: str) -> str:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny_model("llama", seed=7)
    model.name_or_path = base
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                                              base_model_name_or_path=base))
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = base
    shift(adapted, seed)
    adapted.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def test_adapters_are_averaged_merged_not_factor_by_factor(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", 7)
    folders = [adapter_folder(tmp_path / str(seed), seed, base) for seed in (1, 2)]
    policy = CausalLMPolicy.from_pretrained(folders[0], device="cpu")  # trains an adapter
    reference = soup(policy, folders)
    base_weight = load_file(Path(base) / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    deltas = []
    for folder in folders:
        parts = load_file(Path(folder) / "adapter_model.safetensors")
        at = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        deltas.append(4.0 * parts[f"{at}B.weight"] @ parts[f"{at}A.weight"])  # alpha 8, r 2
    held = reference.held["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    torch.testing.assert_close(held, base_weight + (deltas[0] + deltas[1]) / 2, rtol=1e-5, atol=1e-6)
    plain = policy_of(tiny_model("llama", seed=7))  # trains all weights
    torch.testing.assert_close(logp(reference), logp(soup(plain, folders)), rtol=1e-5, atol=1e-6)
    assert reference.identity == soup(plain, folders).identity
    mine = logp(policy)
    torch.testing.assert_close(logp(soup(policy, folders, [1.0, 0.0])), mine, rtol=1e-4, atol=1e-5)
    assert torch.equal(logp(policy), mine)  # the adapter is back on


def test_weights_are_found_below_an_adapter_on_an_adapted_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(tmp_path / "base", 7)
    folders = [adapter_folder(tmp_path / str(seed), seed, base) for seed in (1, 2)]
    expected = average_checkpoints(policy_of(tiny_model("llama", seed=7)), folders, [0.5, 0.5])
    loaded: Any = CausalLMPolicy.from_pretrained(folders[0], device="cpu").module
    twice = SimpleNamespace(module=get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    found = average_checkpoints(twice, folders, [0.5, 0.5])  # type: ignore[arg-type]
    assert len(found) == len(expected)
    assert all(any(torch.equal(tensor, other) for other in found.values()) for tensor in expected.values())


def test_state_keeps_identity_and_notices_other_checkpoints(pair: list[str], tmp_path: Path) -> None:
    policy = policy_of(tiny_model("llama"))
    reference = soup(policy, pair)
    state = reference.state_dict()
    shift(policy.module)
    again = soup(policy, pair)
    again.load_state_dict(state)
    assert again.identity == reference.identity
    with pytest.raises(CheckpointError, match=r"reference\.checkpoints"):
        soup(policy, [pair[0], saved(tmp_path / "other", 9)]).load_state_dict(state)


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "soup"}, "list them as checkpoints"),
    ({"kind": "soup", "checkpoints": ["a", "b"], "weights": [0.5, 0.6]}, "must sum to 1"),
    ({"kind": "soup", "checkpoints": ["a", "b"], "weights": [1.5, -0.5]}, "must not be negative"),
    ({"kind": "soup", "checkpoints": ["a", "b"], "weights": [float("nan"), 1.0]}, "must sum to 1"),
    ({"kind": "soup", "checkpoints": ["a", "b"], "weights": [1.0]}, "1 numbers for 2 checkpoints"),
    ({"kind": "frozen_copy", "checkpoints": ["a"]}, "soup or iterate"),
    ({"kind": "iterate", "checkpoints": ["a", "b"]}, "kind iterate compares with one"),
    ({"kind": "iterate", "checkpoints": ["a"], "every": 2}, "exclude each other"),
    ({"kind": "precomputed", "every": 10}, "every moves the reference"),
    ({"kind": "bema", "lag": 0}, "lag must be at least 1"),
    ({"kind": "bema", "update_after": -1}, "update_after"),
])
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReferenceOptions(**options)


def test_models_that_do_not_average_are_refused(pair: list[str], tmp_path: Path) -> None:
    policy = policy_of(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"reference\.checkpoints.*other tensors"):
        soup(policy, [pair[0], saved(tmp_path / "deep", 1, num_hidden_layers=3)])
    with pytest.raises(ConfigError, match=r"reference\.checkpoints.*shape"):
        soup(policy, [pair[0], saved(tmp_path / "wide", 1, intermediate_size=64)])
    with pytest.raises(ConfigError, match="one vocabulary"):
        soup(policy, [saved(tmp_path / "more", 1, vocab_size=80)])
    with pytest.raises(ConfigError, match="another architecture than the policy"):
        soup(policy, [saved(tmp_path / "gpt2", 1, "gpt2")])
    with pytest.raises(ConfigError, match="does not exist"):
        soup(policy, [pair[0], str(tmp_path / "nowhere" / "deep")])


def test_another_vocabulary_of_the_same_size_is_refused(pair: list[str], tmp_path: Path) -> None:
    folder = Path(saved(tmp_path / "renamed", 1))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w7"', '"w_seven"'))
    with pytest.raises(ConfigError, match=r"another vocabulary.*w7|another vocabulary.*w_seven"):
        soup(policy_of(tiny_model("llama")), [pair[0], str(folder)])


def test_averages_that_are_not_finite_are_refused(pair: list[str], tmp_path: Path) -> None:
    folder = Path(saved(tmp_path / "broken", 1))
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.*not finite"):
        soup(policy_of(tiny_model("llama")), [pair[0], str(folder)])


def test_models_of_different_bases_are_refused_unless_asked_for(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    for folder, base in zip(folders, ("aaa", "bbb"), strict=True):
        write_provenance(Path(folder), base_model="base", base_hash=base, modality="text")
    policy = policy_of(tiny_model("llama"))
    with pytest.raises(ConfigError, match="different base models"):
        soup(policy, folders)
    assert soup(policy, folders, same_base=False).kind == "soup"
    write_provenance(Path(folders[1]), base_model="base", base_hash="aaa", modality="text")
    assert soup(policy, folders).kind == "soup"


def test_tied_tensors_are_averaged_once(tmp_path: Path) -> None:
    folders = [Path(saved(tmp_path / str(seed), seed, "tied")) for seed in (1, 2)]
    policy = policy_of(tiny_model("tied"))
    reference = soup(policy, [str(folder) for folder in folders])
    assert "lm_head.weight" not in reference.held
    with reference.weights():
        assert policy.module.lm_head.weight is policy.module.model.embed_tokens.weight
    state = load_file(folders[0] / "model.safetensors")  # a checkpoint that stores both names with two values
    for folder in folders:
        other = load_file(folder / "model.safetensors")
        save_file({**other, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="one tensor in the policy but differ"):
        soup(policy, [str(folder) for folder in folders])


def test_networks_of_pipelines_are_found(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    small = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8), "norm_num_groups": 4,
             "layers_per_block": 1, "down_block_types": ("DownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "UpBlock2D"), "cross_attention_dim": 6, "attention_head_dim": 4}
    folders, nets = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(UNet2DConditionModel(**small))
        nets[-1].save_pretrained(tmp_path / str(seed) / "unet")
        (tmp_path / str(seed) / "model_index.json").write_text("{}")
        folders.append(str(tmp_path / str(seed)))
    torch.manual_seed(0)
    policy = SimpleNamespace(module=UNet2DConditionModel(**small))
    held = soup(policy, folders).held
    expected = (nets[0].conv_in.weight + nets[1].conv_in.weight) / 2
    assert torch.equal(held["conv_in.weight"], expected.detach())


# -- iterate -------------------------------------------------------------------------------------------------------


def test_iterate_is_the_policy_of_the_last_iteration(pair: list[str]) -> None:
    policy = policy_of(tiny_model("llama", seed=5))
    first = logp(policy)
    start: Any = make_reference(policy, ReferenceOptions(kind="iterate"))
    given: Any = make_reference(policy, ReferenceOptions(kind="iterate", checkpoints=[pair[1]]))
    shift(policy.module)
    for step in range(1, 5):
        start.after_update(step)
    assert torch.equal(logp(start), first)
    torch.testing.assert_close(logp(given), logp(policy_of(tiny_model("llama", seed=2))))
    assert (start.kind, given.kind, start.moving, given.moving) == ("iterate", "iterate", False, False)
    resumed: Any = make_reference(policy_of(tiny_model("llama", seed=5)), ReferenceOptions(kind="iterate"))
    resumed.load_state_dict(start.state_dict())
    other: Any = make_reference(policy_of(tiny_model("llama", seed=6)), ReferenceOptions(kind="iterate"))
    with pytest.raises(CheckpointError, match="other weights"):
        other.load_state_dict(start.state_dict())


def test_iterate_is_renewed_at_outer_boundaries_and_resumes() -> None:
    policy = policy_of(tiny_model("llama"))
    reference: Any = make_reference(policy, ReferenceOptions(kind="iterate", every=2))
    first = logp(reference)
    shift(policy.module, 1)
    reference.after_update(1)
    assert torch.equal(logp(reference), first)
    boundary = logp(policy)
    reference.after_update(2)
    shift(policy.module, 2)
    reference.after_update(3)
    assert torch.equal(logp(reference), boundary)
    assert reference.moving
    resumed: Any = make_reference(policy_of(tiny_model("llama")), ReferenceOptions(kind="iterate", every=2))
    resumed.load_state_dict(reference.state_dict())
    assert torch.equal(logp(resumed), boundary)


# -- bema ----------------------------------------------------------------------------------------------------------


def bema(policy: Any, **options: Any) -> Any:
    return make_reference(policy, ReferenceOptions(kind="bema", **options))


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"ema_power": 0.2, "bias_power": 0.1, "lag": 3, "multiplier": 2.0},
                                     {"min_ema_multiplier": 0.5}, {"update_after": 2}])
def test_bema_agrees_with_trl(options: dict[str, Any]) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    model = tiny_model("tied")
    policy = policy_of(model)
    theirs = callbacks.BEMACallback(update_freq=2, **options)
    theirs.on_train_begin(None, None, None, model=model)
    ours = bema(policy, every=2, **options)
    for step in range(1, 8):
        shift(model, step, scale=0.1)
        theirs.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
        ours.after_update(step)
        for name, parameter in theirs.running_model.named_parameters():
            torch.testing.assert_close(ours.held[name], parameter.detach(), rtol=1e-6, atol=1e-6)


def test_bema_closed_form_and_resuming() -> None:
    policy = policy_of(tiny_model("llama"))
    reference = bema(policy, every=1, lag=1, multiplier=1.0, ema_power=1.0, bias_power=1.0)
    name = "model.norm.weight"
    start = policy.module.get_parameter(name).detach().clone()
    shift(policy.module, 1)
    theta = policy.module.get_parameter(name).detach().clone()
    reference.after_update(1)  # beta = alpha = 1 / 2
    torch.testing.assert_close(reference.held[name], (start + theta) / 2 + (theta - start) / 2)
    resumed = bema(policy_of(tiny_model("llama")), every=1, lag=1, multiplier=1.0, ema_power=1.0, bias_power=1.0)
    resumed.load_state_dict(copy.deepcopy(reference.state_dict()))
    resumed.policy = policy
    shift(policy.module, 2)
    for one in (reference, resumed):
        one.after_update(2)
    assert all(torch.equal(reference.held[key], resumed.held[key]) for key in reference.held)
    assert bema(policy).every == 400
    with evaluating(policy.module), reference.weights():
        assert torch.isfinite(logp(policy)).all()
