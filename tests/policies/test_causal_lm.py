"""A row's scores are the same alone, padded, packed and behind a shared prompt, and equal to the plain dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_text import VOCABULARY, tiny_model, tiny_tokenizer, write_gguf

from mmalign.core.logprobs import dense_log_probs
from mmalign.core.seeding import generator
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.policies.base import Policy, TextSampling
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.heads import Head

TOKENIZER = tiny_tokenizer()
KINDS = ("llama", "tied", "qwen2", "gpt2", "gemma2", "cohere", "granite")
LAYOUTS = ("padded", "packed", "shared_prefix")
_MODELS: dict[tuple[str, bool], Any] = {}


def model_of(kind: str, *, double: bool = False) -> Any:
    if (kind, double) not in _MODELS:
        _MODELS[kind, double] = tiny_model(kind, double=double)
    return _MODELS[kind, double]


def policy_of(kind: str, layout: str = "auto", *, double: bool = False) -> CausalLMPolicy:
    return CausalLMPolicy(model_of(kind, double=double), TOKENIZER, layout=layout)  # type: ignore[arg-type]


def make_rows(sizes: list[tuple[int, int, int]], seed: int = 0) -> Rows:
    """Rows from (prompt number, prompt length, completion length); equal number and length share the prompt."""
    source = torch.Generator().manual_seed(seed)
    prompts: dict[tuple[int, int], list[int]] = {}
    ids, labels = [], []
    for number, prompt_length, size in sizes:
        key = (number, prompt_length)
        if key not in prompts:
            prompts[key] = torch.randint(7, VOCABULARY, (prompt_length,), generator=source).tolist()
        completion = torch.randint(7, VOCABULARY, (size,), generator=source).tolist()
        ids.append(prompts[key] + completion)
        labels.append([-100] * prompt_length + completion)
    return Rows({"input_ids": ids, "labels": labels})


ROWS = make_rows([(0, 5, 4), (0, 5, 7), (1, 3, 2), (0, 5, 1), (1, 3, 6), (2, 9, 3)])


def dense(model: Any, rows: Rows, temperature: float = 1.0) -> list[torch.Tensor]:
    """Every row alone through the model's own logits."""
    scores = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits / temperature
        logp = dense_log_probs(logits, torch.tensor([labels]))[0]
        scores.append(logp[torch.tensor(labels[1:]) != -100])
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_the_dense_ones_of_each_row_alone(kind: str, layout: str) -> None:
    policy = policy_of(kind, layout)
    with torch.no_grad():
        scores = policy.log_probs(ROWS, temperature=0.7)
        oracle = dense(policy.module, ROWS, 0.7)
    assert not policy.scores.dense
    assert torch.equal(scores.mask, policy.action_mask(ROWS))
    for row, expected in enumerate(oracle):
        torch.testing.assert_close(scores.logp[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert scores.logp[row, len(expected) :].abs().sum() == 0


def gradients(policy: CausalLMPolicy, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    policy.module.zero_grad()
    logp = policy.log_probs(rows).logp
    weights = torch.linspace(0.5, 1.5, logp.numel(), dtype=logp.dtype).view_as(logp)
    (logp * weights).sum().backward()
    parts = [p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]
    return logp.detach(), torch.cat(parts)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=7),
       st.sampled_from(["llama", "gpt2", "gemma2"]))
def test_layouts_agree_in_value_and_gradient(sizes: list[tuple[int, int, int]], kind: str) -> None:
    # Only GPT-2 is double precision throughout; the others normalise and rotate in float32.
    tolerance = 1e-10 if kind == "gpt2" else 2e-5
    rows = make_rows(sizes)
    results = [gradients(policy_of(kind, layout, double=True), rows) for layout in LAYOUTS]
    alone = torch.zeros_like(results[0][0])
    policy = policy_of(kind, double=True)
    with torch.no_grad():
        for row in range(len(rows)):
            one = policy.log_probs(rows.take([row])).logp[0]
            alone[row, : len(one)] = one
    for logp, gradient in results:
        torch.testing.assert_close(logp, alone, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(gradient, results[0][1], atol=10 * tolerance, rtol=tolerance)


def test_gradient_equals_that_of_the_dense_loss() -> None:
    for kind, tolerance in (("gpt2", 1e-10), ("tied", 2e-5), ("gemma2", 2e-5)):
        policy = policy_of(kind, double=True)
        policy.module.zero_grad()
        policy.log_probs(ROWS).logp.sum().backward()
        ours = {name: p.grad.clone() for name, p in policy.module.named_parameters()}
        policy.module.zero_grad()
        torch.cat(dense(policy.module, ROWS)).sum().backward()
        for name, parameter in policy.module.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, atol=10 * tolerance, rtol=tolerance, msg=name)


def test_further_scores() -> None:
    policy = policy_of("llama")
    want = ("entropy", "lse", "mean_logp", "sum_p2", "correct")
    with torch.no_grad():
        scores = policy.log_probs(ROWS, want=want)
        logits = policy.module(input_ids=torch.tensor([ROWS["input_ids"][0]])).logits[0, 4:-1]
    log_p = logits.log_softmax(-1)
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1), "lse": logits.logsumexp(-1), "mean_logp": log_p.mean(-1),
        "sum_p2": log_p.exp().square().sum(-1),
        "correct": (logits.argmax(-1) == torch.tensor(ROWS["labels"][0][5:])).float(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(scores, name)[0, :4], value, atol=1e-5, rtol=1e-5)


def test_rows_without_actions_are_zero_and_connected() -> None:
    policy = policy_of("llama")
    rows = make_rows([(0, 4, 0), (1, 3, 0)])
    policy.module.zero_grad()
    scores = policy.log_probs(rows)
    assert not scores.mask.any()
    assert scores.logp.shape == (2, 1)
    scores.logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.module.parameters())


def test_unreachable_head_falls_back_to_dense_logits(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    forward = model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 1.5, VOCABULARY)
        return output

    odd.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    model.forward = odd
    policy = CausalLMPolicy(model, TOKENIZER)
    with torch.no_grad():
        scores = policy.log_probs(ROWS, want=("entropy", "correct"))
        oracle = dense(model, ROWS)
    assert policy.scores.dense
    assert caplog.text.count("do not reproduce") == 1
    for row, expected in enumerate(oracle):
        torch.testing.assert_close(scores.logp[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert scores.entropy is not None
    assert (scores.entropy[scores.mask] > 0).all()


def test_sliding_windows_are_padded_unless_no_row_reaches_them() -> None:
    policy = CausalLMPolicy(tiny_model("mistral"), TOKENIZER)  # window 6
    short = make_rows([(0, 2, 2), (0, 2, 3), (0, 2, 1)])
    assert policy.token_layout(ROWS).kind == "padded"
    assert policy.scores.takes_masks(6)
    assert not policy.scores.takes_masks(7)
    with torch.no_grad():
        for rows in (ROWS, short):
            scores = policy.log_probs(rows)
            for row, expected in enumerate(dense(policy.module, rows)):
                torch.testing.assert_close(scores.logp[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.layout: packed"):
        CausalLMPolicy(policy.module, TOKENIZER, layout="packed").log_probs(ROWS)


def test_eager_attention_takes_masks_too() -> None:
    sdpa = policy_of("llama", "shared_prefix")
    eager = CausalLMPolicy(tiny_model("llama", attention="eager"), TOKENIZER, layout="shared_prefix")
    with torch.no_grad():
        torch.testing.assert_close(eager.log_probs(ROWS).logp, sdpa.log_probs(ROWS).logp, atol=1e-5, rtol=1e-5)


def test_rows_beyond_the_window_are_refused() -> None:
    with pytest.raises(DataError, match="131 tokens, more than the model's window of 128"):
        policy_of("gpt2").log_probs(make_rows([(0, 130, 1)]))


def test_no_dropout_without_gradients() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    policy = CausalLMPolicy(model.train(), TOKENIZER)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = policy.log_probs(ROWS).logp, policy.log_probs(ROWS).logp
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(part.training for part in model.modules())
    assert not torch.equal(policy.log_probs(ROWS).logp, first)


# -- adapters ------------------------------------------------------------------------------------------------------


def lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_" in name:
                parameter.normal_(0.0, 0.3)
    return adapted


def adapted_models() -> dict[str, Any]:
    from peft import LNTuningConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    torch.manual_seed(3)
    virtual = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 4}
    return {
        "lora": lambda: lora(tiny_model("llama")),
        "lora on the head": lambda: lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"]),
        "lora on tied embeddings": lambda: lora(tiny_model("tied"), target_modules=["q_proj", "embed_tokens"]),
        "dora on the head": lambda: lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"], use_dora=True),
        "trained head": lambda: lora(tiny_model("llama"), modules_to_save=["lm_head"]),
        "trained tokens": lambda: lora(tiny_model("tied"), trainable_token_indices=[3, 9]),
        "layer norm": lambda: get_peft_model(tiny_model("llama"), LNTuningConfig(task_type=TaskType.CAUSAL_LM)),
        "prompt": lambda: get_peft_model(tiny_model("llama"), PromptTuningConfig(**virtual)),
        "prefix": lambda: get_peft_model(tiny_model("llama"), PrefixTuningConfig(**virtual)),
    }


@pytest.mark.parametrize("name", list(adapted_models()))
def test_adapters_score_as_the_adapted_model_does(name: str) -> None:
    model = adapted_models()[name]()
    policy = CausalLMPolicy(model, TOKENIZER)
    virtual = 4 if name in ("prompt", "prefix") else 0
    with torch.no_grad():
        scores = policy.log_probs(ROWS)
        for row, (ids, labels) in enumerate(zip(ROWS["input_ids"], ROWS["labels"], strict=True)):
            # transformers would otherwise ask for a cache of its own
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
            logits = logits[:, virtual if name == "prompt" else 0 :]
            expected = dense_log_probs(logits, torch.tensor([labels]))[0][torch.tensor(labels[1:]) != -100]
            torch.testing.assert_close(scores.logp[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    logp = policy.log_probs(ROWS).logp
    logp.sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None and bool(grad.any()) for grad in trained.values())
    assert policy.scores.dense == (name == "dora on the head")
    assert (policy.token_layout(ROWS).kind == "padded") == (virtual > 0)


def test_gradient_checkpointing_changes_nothing() -> None:
    for adapted in (False, True):
        model = tiny_model("llama").train()
        policy = CausalLMPolicy(lora(model) if adapted else model, TOKENIZER)
        plain = gradients(policy, ROWS)[1]
        policy.gradient_checkpointing(True)
        recomputed = gradients(policy, ROWS)[1]
        policy.gradient_checkpointing(False)
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_wrapped_in_distributed_data_parallel(tmp_path: Path) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for build in (lambda: tiny_model("llama"), lambda: lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"])):
            policy = CausalLMPolicy(build(), TOKENIZER)
            expected = gradients(policy, ROWS)
            policy.replace_module(torch.nn.parallel.DistributedDataParallel(policy.module))
            actual = gradients(policy, ROWS)
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
            assert policy.sample(["w1"], 2, TextSampling(max_new_tokens=3), generator(0)).mask.any()
    finally:
        distributed.destroy_process_group()


# -- values, hidden states -----------------------------------------------------------------------------------------


def test_values_are_those_of_the_state_before_each_action() -> None:
    policy = policy_of("llama")
    policy.value_head = Head(32, initial=0.5, generator=generator(0))
    with torch.no_grad():
        scores = policy.log_probs(ROWS, want=("values",))
        hidden = policy.module.model(input_ids=torch.tensor([ROWS["input_ids"][1]])).last_hidden_state[0]
        last = policy.hidden_states(ROWS, at="last")
        states = policy.hidden_states(ROWS)
    assert scores.values is not None
    torch.testing.assert_close(scores.values[1, :7], policy.value_head(hidden[4:-1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last[1], hidden[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[1, :7], hidden[4:-1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="value_head"):
        policy_of("llama").log_probs(ROWS, want=("values",))


# -- data, identity, saving ----------------------------------------------------------------------------------------


def test_is_a_policy_and_prepares_data() -> None:
    policy = policy_of("llama")
    assert isinstance(policy, Policy) or all(hasattr(policy, name) for name in Policy.__protocol_attrs__)  # type: ignore[attr-defined]
    examples = [{"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5", "margin": 0.5}]
    prepared, report = policy.prepare_dataset(examples, fields=("chosen", "rejected"))
    rows = policy.encode_rows(prepared)
    assert report.kept == 1
    assert rows["margin"] == [0.5]
    chosen = rows.field("chosen")
    assert policy.action_mask(chosen).sum() == 3  # w3 w4 <eos>
    assert policy.log_probs(chosen).logp.shape == (1, 3)
    with pytest.raises(DataError, match="prepare_dataset"):
        policy.encode_rows(examples)


def test_identity_follows_the_weights_only() -> None:
    model = tiny_model("tied")
    policy = CausalLMPolicy(model, TOKENIZER)
    first = policy.identity()
    assert first == CausalLMPolicy(tiny_model("tied"), TOKENIZER).identity()
    assert first != CausalLMPolicy(tiny_model("tied", seed=1), TOKENIZER).identity()
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert policy.identity() != first


def test_save_and_load(tmp_path: Path) -> None:
    policy = policy_of("llama")
    policy.module.generation_config.temperature = 0.3  # invalid without do_sample; published models have it
    policy.save_pretrained(tmp_path / "base")
    assert policy.module.generation_config.do_sample in (None, False)
    loaded = CausalLMPolicy.from_pretrained(tmp_path / "base", device="cpu")
    assert loaded.identity() == policy.identity()
    assert loaded.tokenizer.chat_template == TOKENIZER.chat_template
    assert "float32 on cpu" in loaded.summary()
    half = CausalLMPolicy.from_pretrained(tmp_path / "base", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}

    adapted = CausalLMPolicy(lora(loaded.module), loaded.tokenizer)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = CausalLMPolicy.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    alone = CausalLMPolicy.from_pretrained(tmp_path / "adapter", adapter_trainable=False, device="cpu")
    with torch.no_grad():
        expected = adapted.log_probs(ROWS).logp
        for other in (again, alone):
            torch.testing.assert_close(other.log_probs(ROWS).logp, expected, atol=1e-6, rtol=1e-6)
    assert any(p.requires_grad for p in again.module.parameters())
    assert not any(p.requires_grad for p in alone.module.parameters())


def test_gguf_folders_load_and_are_saved_as_plain_models(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    policy = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(ROWS).logp, policy_of("llama").log_probs(ROWS).logp)
    assert all(p.requires_grad for p in policy.module.parameters())
    policy.save_pretrained(tmp_path / "plain")
    again = CausalLMPolicy.from_pretrained(tmp_path / "plain", device="cpu")
    assert again.identity() == policy.identity()
    assert again.encode_prompts(["w1"]) == policy.encode_prompts(["w1"]) == [[2, 3]]
    write_gguf(tmp_path / "second.gguf", model)
    with pytest.raises(CheckpointError, match=r"second\.gguf, tiny\.gguf"):
        CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    assert CausalLMPolicy.from_pretrained(tmp_path, gguf_file="second.gguf", device="cpu").identity() == policy.identity()


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    policy = policy_of("llama")
    for damage in ("missing", "config", "weights", "keys", "tokenizer"):
        folder = tmp_path / damage
        if damage != "missing":
            policy.save_pretrained(folder)
        if damage == "config":
            (folder / "config.json").write_text("{")
        elif damage == "weights":
            data = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        elif damage == "keys":
            from safetensors.torch import load_file, save_file

            state = load_file(folder / "model.safetensors")
            state.pop("model.layers.1.mlp.up_proj.weight")
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        elif damage == "tokenizer":
            (folder / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=str(folder)):
            CausalLMPolicy.from_pretrained(folder, device="cpu")
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        CausalLMPolicy.from_pretrained(tmp_path / "keys", dtype="half")


def test_neftune_adds_noise_in_training_only() -> None:
    pytest.importorskip("mmalign.core.supervised")
    policy = policy_of("llama")
    policy.module.train()
    plain = policy.log_probs(ROWS).logp.detach()
    with policy.neftune(5.0, generator(0, "noise")):
        assert not torch.equal(policy.log_probs(ROWS).logp, plain)
        with torch.no_grad():
            torch.testing.assert_close(policy.log_probs(ROWS).logp, plain)
    torch.testing.assert_close(policy.log_probs(ROWS).logp.detach(), plain)
