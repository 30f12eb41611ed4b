"""The in-process engine: log-probs are the scorer's, greedy is ``generate``'s, draws follow the model's distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import VOCABULARY, tiny_model, tiny_tokenizer

from mmalign.core.seeding import generator
from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import Rollout, TextSampling
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.engines import ENGINES, RolloutResult
from mmalign.policies.engines.cache import GrowingLayer, new_cache
from mmalign.policies.engines.sampling import UniformStream, draw_tokens, inverse_cdf

TOKENIZER = tiny_tokenizer()
KINDS = ("llama", "tied", "qwen2", "gpt2", "gemma2", "mistral", "cohere", "granite")
PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9 w10", "w11", "w3 w1"]


def policy_of(kind: str = "llama", **changes: Any) -> CausalLMPolicy:
    return CausalLMPolicy(tiny_model(kind, **changes), TOKENIZER)


def draw(policy: CausalLMPolicy, n: int = 5, *, seed: int = 0, prompts: list[Any] | None = None, **options: Any) -> Rollout:
    options = {"max_new_tokens": 14, **options}
    return policy.sample(prompts or PROMPTS, n, TextSampling(**options), generator(seed, "sampling"))


def lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return adapted


# -- replay error --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probs_are_the_scorers(kind: str, temperature: float) -> None:
    policy = policy_of(kind)
    rollout = draw(policy, temperature=temperature, rows_per_forward=8, max_new_tokens=24)
    with torch.no_grad():
        scores = policy.log_probs(rollout.rows, temperature=rollout.temperature)
    assert torch.equal(scores.mask, rollout.mask)
    assert len(set(rollout.mask.sum(1).tolist())) > 1 or kind == "gpt2"  # which hardly ever says the end
    torch.testing.assert_close(scores.logp, rollout.old_logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [
    lambda: lora(tiny_model("llama"), target_modules=["q_proj", "v_proj", "lm_head"]),
    lambda: prompt_tuned("PROMPT_TUNING"), lambda: prompt_tuned("PREFIX_TUNING"),
    lambda: prompt_tuned("PROMPT_TUNING", "gpt2"), lambda: tiny_model("llama", attention="eager"),
], ids=["lora", "prompt", "prefix", "prompt gpt2", "eager"])
def test_sampled_log_probs_are_the_scorers_with_adapters(build: Any) -> None:
    policy = CausalLMPolicy(build(), TOKENIZER)
    rollout = draw(policy, rows_per_forward=16)
    with torch.no_grad():
        scores = policy.log_probs(rollout.rows)
    torch.testing.assert_close(scores.logp, rollout.old_logp, atol=1e-5, rtol=0)


def prompt_tuned(kind: str, model: str = "llama") -> Any:
    from peft import PeftType, get_peft_config, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(tiny_model(model), get_peft_config(
        {"peft_type": PeftType(kind), "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}))


@pytest.mark.peer
def test_log_probs_equal_those_of_generate() -> None:
    policy = policy_of("llama")
    rollout = draw(policy, 1, prompts=["w1 w2 w3 w4"] * 1, temperature=0.7)
    prompt = policy.encode_prompts(["w1 w2 w3 w4"])[0]
    size = int(rollout.mask.sum())
    forced = torch.tensor([rollout.rows["input_ids"][0]])

    class Force:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.scores.append((scores / 0.7).log_softmax(-1))
            result = torch.full_like(scores, -torch.inf)
            result[:, forced[0, ids.shape[1]]] = 0.0
            return result

        scores: list[torch.Tensor] = []

    force = Force()
    policy.module.eval().generate(
        input_ids=forced[:, : len(prompt)], attention_mask=torch.ones(1, len(prompt)), do_sample=False,
        max_new_tokens=size, logits_processor=[force],
    )
    theirs = [s[0, token].item() for s, token in zip(force.scores, forced[0, len(prompt) :].tolist(), strict=True)]
    torch.testing.assert_close(rollout.old_logp[0, :size], torch.tensor(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"top_p": 0.6}, {"top_k": 12, "top_p": 0.8}])
def test_processed_log_probs_equal_transition_scores(options: dict[str, Any]) -> None:
    policy = policy_of("qwen2")
    torch.manual_seed(1)
    prompt = torch.tensor([policy.encode_prompts(["w5 w6"])[0]])
    output = policy.module.eval().generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.9, max_new_tokens=10,
        eos_token_id=None, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        **{"top_k": 0, "top_p": 1.0, **options},
    )
    theirs = policy.module.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)[0]
    tokens = output.sequences[0, prompt.shape[1] :]
    logits = torch.stack([policy.module(input_ids=output.sequences[:, : prompt.shape[1] + t]).logits[0, -1] for t in range(10)])
    # The uniform number that leads to their token, found by trying many.
    sampling = TextSampling(temperature=0.9, **options)
    for step in range(10):
        grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
        drawn, logp = draw_tokens(logits[step].detach().expand(4000, -1).clone(), grid, sampling)
        mine = logp[drawn == tokens[step]]
        assert len(mine)
        torch.testing.assert_close(mine[0], theirs[step], atol=1e-5, rtol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(kind: str) -> None:
    policy = policy_of(kind)
    rollout = draw(policy, 2, temperature=0, max_new_tokens=12)
    assert rollout.logprob_mode == "raw"
    assert rollout.temperature == 1.0
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([policy.encode_prompts([prompt])[0]])
        theirs = policy.module.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            eos_token_id=sorted(policy.stop_ids), pad_token_id=0,
        )[0].tolist()
        assert rollout.rows["input_ids"][2 * row] == theirs
        assert rollout.rows["input_ids"][2 * row + 1] == theirs
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(rollout.rows).logp, rollout.old_logp, atol=1e-5, rtol=0)


# -- what a rollout holds ------------------------------------------------------------------------------------------


def test_rollout_layout_and_end_tokens() -> None:
    policy = policy_of("llama")
    policy.weight_version = 7
    messages = [{"role": "user", "content": "w3 w4"}]
    rollout = draw(policy, 6, prompts=["w1 w2", messages, [9, 10, 11]], max_new_tokens=25)
    assert rollout.group.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert rollout.prompts[5:8] == ["w1 w2", messages, messages]
    assert rollout.weight_version == 7
    assert rollout.old_logp.dtype == torch.float32
    reasons = Counter(rollout.finish_reason)
    assert reasons["stop"]
    assert reasons["length"]
    for row in range(len(rollout)):
        ids, labels = rollout.rows["input_ids"][row], rollout.rows["labels"][row]
        completion = [label for label in labels if label != -100]
        assert ids[-len(completion) :] == completion
        assert labels[: len(ids) - len(completion)] == [-100] * (len(ids) - len(completion))
        assert int(rollout.mask[row].sum()) == len(completion)
        ends = [at for at, token in enumerate(completion) if token in policy.stop_ids]
        assert ends == ([len(completion) - 1] if rollout.finish_reason[row] == "stop" else [])
        assert len(completion) == 25 or rollout.finish_reason[row] == "stop"
        sample = rollout.samples[row]
        text = sample[0]["content"] if 6 <= row < 12 else sample
        assert text == TOKENIZER.decode(completion, skip_special_tokens=True)
    assert rollout.samples[6][0]["role"] == "assistant"


def test_unfold() -> None:
    rollout = draw(policy_of("llama"), 2)
    rollout.columns = {"advantages": [float(i) for i in range(8)], "answer": ["x"] * 8, "returns": list(torch.zeros(8, 14))}
    rollout.ref_logp = rollout.old_logp - 1
    policy = policy_of("llama")
    rows = policy.unfold(rollout, fraction=1.0, generator=generator(0))
    assert rows["advantages"].tolist() == list(range(8))
    assert rows["returns"].shape == (8, 14)
    assert rows["answer"] == ["x"] * 8
    assert torch.equal(rows["action_mask"], rollout.mask)
    assert torch.equal(rows["ref_logp"], rollout.old_logp - 1)
    assert torch.equal(policy.action_mask(rows), rollout.mask)
    with pytest.raises(ConfigError, match="action_fraction"):
        policy.unfold(rollout, fraction=0.5, generator=generator(0))


def test_same_seed_same_samples_however_they_are_batched() -> None:
    policy = policy_of("llama")
    # Short and long completions mixed: some batches shrink, some end early.
    first = draw(policy, 6, max_new_tokens=40)
    for rows_per_forward in (1, 7):
        again = draw(policy, 6, max_new_tokens=40, rows_per_forward=rows_per_forward)
        assert again.rows["input_ids"] == first.rows["input_ids"]
        torch.testing.assert_close(again.old_logp, first.old_logp, atol=1e-5, rtol=0)
    other = draw(policy, 6, seed=1, max_new_tokens=40)
    assert other.rows["input_ids"] != first.rows["input_ids"]
    assert len({tuple(ids) for ids in first.rows["input_ids"][:6]}) > 1


def test_generator_moves_on_by_the_same_amount() -> None:
    states = []
    for size in (1, 30):
        source = generator(0, "sampling")
        policy_of("llama").sample(PROMPTS, 2, TextSampling(max_new_tokens=size), source)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1])


def test_training_mode_is_restored_and_dropout_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    policy = CausalLMPolicy(model, TOKENIZER)
    state = torch.get_rng_state()
    rollout = draw(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.transformer.h[0].training
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(rollout.rows).logp, rollout.old_logp, atol=1e-5, rtol=0)


def test_min_new_tokens_and_stop_strings() -> None:
    policy = policy_of("llama")
    long = draw(policy, 20, min_new_tokens=12, max_new_tokens=14)
    assert int(long.mask.sum(1).min()) >= 12
    assert not torch.isinf(long.old_logp).any()
    free = draw(policy, 20, max_new_tokens=14)
    word = Counter(w for text in free.samples for w in text.split()).most_common(1)[0][0]
    stopped = draw(policy, 20, max_new_tokens=14, stop=[word])
    cut = 0
    for before, after, reason in zip(free.samples, stopped.samples, stopped.finish_reason, strict=True):
        words = before.split()
        if word in before:
            at = next(index for index, w in enumerate(words) if word in w)
            assert after.split() == words[: at + 1]
            assert reason == "stop"
            cut += at + 1 < len(words)
        else:
            assert after == before
    assert cut


def test_windows_and_bad_requests() -> None:
    policy = policy_of("gpt2")
    rollout = draw(policy, 3, prompts=[[7] * 120, [8] * 3], max_new_tokens=20, min_new_tokens=20)
    assert rollout.mask.sum(1).tolist() == [8] * 3 + [20] * 3
    with pytest.raises(DataError, match="prompt 1 has 128 tokens"):
        draw(policy, prompts=[[7], [7] * 128])
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        draw(policy, prompts=[""])
    with pytest.raises(ConfigError, match="at least 1"):
        draw(policy, 0)


def test_engines_are_a_table() -> None:
    class Fixed:
        name = "fixed"

        def __init__(self, host: Any) -> None:
            self.host = host

        def generate(self, prompts: Any, n: int, sampling: Any, source: Any) -> list[RolloutResult]:
            return [RolloutResult(list(p), [9, 1], [-1.0, -2.0], "stop") for p in prompts for _ in range(n)]

    if "fixed" not in ENGINES:
        ENGINES.register("fixed")(Fixed)
    policy = CausalLMPolicy(tiny_model("llama"), TOKENIZER, engine="fixed")
    rollout = draw(policy, 2, prompts=["w1"])
    assert rollout.old_logp.tolist() == [[-1.0, -2.0]] * 2
    assert rollout.samples == ["w2", "w2"]


# -- sampling ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 1400), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.9, 0.999]))
def test_inverse_cdf_finds_the_first_entry_above(size: int, seed: int, uniform: float, zeros: float) -> None:
    source = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, size, generator=source).square()
    weights[torch.rand(3, size, generator=source) < zeros] = 0.0
    weights[:, int(torch.randint(size, (), generator=source))] = 0.5
    chosen, total = inverse_cdf(weights, torch.full((3,), uniform, dtype=torch.float64))
    sums = weights.double().cumsum(-1)
    torch.testing.assert_close(total, sums[:, -1], atol=1e-6, rtol=1e-6)
    for row, index in enumerate(chosen.tolist()):
        assert weights[row, index] > 0
        target = uniform * sums[row, -1]
        # Block sums are float32, so the place may differ by their rounding.
        slack = 1e-6 * size
        assert sums[row, index] >= target - slack
        assert sums[row, index] - weights[row, index] <= target + slack


def test_draws_follow_the_distribution() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(VOCABULARY * 10, generator=source) * 2
    count = 40_000
    tokens, logp = draw_tokens(logits.expand(count, -1).clone(), torch.rand(count, generator=source, dtype=torch.float64),
                               TextSampling(temperature=1.3))
    p = (logits / 1.3).softmax(-1)
    seen = torch.bincount(tokens, minlength=len(p)) / count
    assert float((seen - p).abs().sum()) < 0.12  # expected about sqrt(2 V / (pi n)) = 0.1
    assert float((seen - p).abs().max()) < 5 * float((p / count).sqrt().max())
    torch.testing.assert_close(logp, p.log()[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [60, 1500])
@pytest.mark.parametrize("options", [
    {"top_k": 5}, {"top_p": 0.7}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.9}, {"top_k": 10**6},
])
def test_truncation_equals_transformers(size: int, options: dict[str, Any]) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(3))
    theirs = logits / 0.8
    if "top_k" in options:
        theirs = TopKLogitsWarper(options["top_k"])(None, theirs)
    if "top_p" in options:
        theirs = TopPLogitsWarper(options["top_p"])(None, theirs)
    expected = theirs.log_softmax(-1)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    for row in range(4):
        tokens, logp = draw_tokens(logits[row].expand(2000, -1).clone(), grid, TextSampling(temperature=0.8, **options))
        torch.testing.assert_close(logp, expected[row][tokens], atol=2e-5, rtol=1e-5)
        likely = (expected[row] > torch.tensor(2e-3).log()).nonzero().flatten().tolist()
        assert set(likely) <= set(tokens.tolist())


def test_log_probs_over_a_large_vocabulary_are_exact() -> None:
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    tokens, logp = draw_tokens(logits.clone(), torch.linspace(0, 0.999, 8, dtype=torch.float64), TextSampling())
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), exact, atol=2e-6, rtol=0)


def test_uniform_stream_is_a_function_of_row_and_step() -> None:
    first, second = (UniformStream(3, generator(0), steps=4) for _ in range(2))
    late = second.at(9)
    early = [first.at(step) for step in range(10)]
    assert torch.equal(late, early[9])
    assert all(((u >= 0) & (u < 1)).all() for u in early)
    assert len({float(u[0]) for u in early}) == 10


def test_growing_layer_holds_what_the_stock_layer_holds() -> None:
    from transformers.cache_utils import DynamicLayer

    ours, theirs = GrowingLayer(), DynamicLayer()
    source = torch.Generator().manual_seed(0)
    for step in range(150):
        if step == 1:
            index = torch.tensor([0, 0, 1, 1])
            ours.reorder_cache(index)
            theirs.reorder_cache(index)
        if step == 80:
            index = torch.tensor([3, 0])
            ours.reorder_cache(index)
            theirs.reorder_cache(index)
        rows = 2 if step in (0, *range(80, 150)) else 4
        states = [torch.randn(rows, 2, 5 if step == 0 else 1, 3, generator=source) for _ in range(2)]
        for mine, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_cache_uses_the_librarys_layers_for_windows() -> None:
    layers = new_cache(tiny_model("gemma2").config).layers
    assert isinstance(layers[1], GrowingLayer) != isinstance(layers[0], GrowingLayer)
