"""Diffusion policies: what is scored is what was sampled, whatever the split, the guidance, the family or the adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_diffusion import add_lora, caption, noise_image, save_tiny_sd, save_tiny_sd3, save_tiny_sdxl
from torch import Tensor

from mmalign.core.seeding import generator
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError
from mmalign.policies.base import DiffusionSampling, Rollout
from mmalign.policies.diffusion import DiffusionDraw, DiffusionPolicy
from mmalign.policies.modules import adapters_disabled

PROMPTS = [caption(0, 1, 4), caption(0, 2, 5), caption(11, 3, 6)]
FAMILIES = ("sd_epsilon", "sd_v_prediction", "sdxl", "sd3")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd_epsilon": save_tiny_sd(root / "sd"), "sdxl": save_tiny_sdxl(root / "sdxl"), "sd3": save_tiny_sd3(root / "sd3"),
        "sd_v_prediction": save_tiny_sd(root / "sd_v", prediction_type="v_prediction"),
    }


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, DiffusionPolicy]:
    """One policy per family, for tests that change nothing."""
    return {name: DiffusionPolicy.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture
def policy(folders: dict[str, Path]) -> DiffusionPolicy:
    """A fresh SD1-like policy, for tests that change it."""
    return DiffusionPolicy.from_pretrained(folders["sd_epsilon"], device="cpu")


def examples(count: int = 4) -> list[dict[str, Any]]:
    return [{"prompt": PROMPTS[i % 3], "image": noise_image(i)} for i in range(count)]


def rollout_of(policy: DiffusionPolicy, n: int = 2, seed: int = 0, **sampling: Any) -> Rollout:
    options = {"steps": 5, "guidance_scale": 3.0, **sampling}
    return policy.sample(PROMPTS, n, DiffusionSampling(**options), generator(seed, "test"))


def unfolded(policy: DiffusionPolicy, rollout: Rollout, fraction: float = 1.0, seed: int = 0) -> Rows:
    rollout.columns["advantages"] = [float(i) for i in range(len(rollout))]
    return policy.unfold(rollout, fraction=fraction, generator=generator(seed, "unfold"))


def replay_error(policy: DiffusionPolicy, rows: Rows, size: int) -> float:
    chunks = [rows.take(range(a, min(a + size, len(rows)))) for a in range(0, len(rows), size)]
    with torch.no_grad():
        logp = torch.cat([policy.log_probs(chunk).logp for chunk in chunks])
    return float((logp.cpu() - rows["old_logp"]).abs().max())


# -- rollouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_replayed_steps_have_the_log_probs_they_were_sampled_with(
    loaded: dict[str, DiffusionPolicy], family: str, guidance: float,
) -> None:
    policy = loaded[family]
    rollout = rollout_of(policy, guidance_scale=guidance)
    assert rollout.old_logp.dtype == torch.float32
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert bool(rollout.mask.all())
    rows = unfolded(policy, rollout)
    assert len(rows) == 6 * 5
    for size in (7, 30):
        assert replay_error(policy, rows, size) < 1e-5
    assert replay_error(policy, rows.take([0, 8, 16, 24]), 1) < 1e-5


@pytest.mark.parametrize("rule", ["flow_grpo", "dance"])
def test_flow_steps_replay_under_both_noise_rules(loaded: dict[str, DiffusionPolicy], rule: str) -> None:
    rollout = rollout_of(loaded["sd3"], noise_rule=rule)
    assert replay_error(loaded["sd3"], unfolded(loaded["sd3"], rollout), 4) < 1e-5


def test_replay_with_a_lora(policy: DiffusionPolicy) -> None:
    before = rollout_of(policy)
    add_lora(policy.module, rank=4, alpha=16, scale=0.1)
    rollout = rollout_of(policy)
    # The same noise gives the same log-probs of other latents: they are those of the noise.
    torch.testing.assert_close(before.old_logp, rollout.old_logp, rtol=0, atol=1e-5)
    assert not torch.allclose(before.rows["trajectory"], rollout.rows["trajectory"], atol=1e-2)
    rows = unfolded(policy, rollout)
    assert replay_error(policy, rows, 3) < 1e-5
    with adapters_disabled(policy.module):  # a reference: nothing that was encoded before may stand for its prediction
        base = policy.log_probs(rows.take(range(6))).logp
        assert float((base - rows["old_logp"][:6]).abs().max()) > 1e-3
    assert replay_error(policy, rows, 6) < 1e-5


def test_the_stored_action_is_the_scored_one_in_bfloat16(folders: dict[str, Path]) -> None:
    policy = DiffusionPolicy.from_pretrained(folders["sd_epsilon"], device="cpu", dtype="bfloat16")
    rollout = rollout_of(policy, n=1, steps=4)
    assert rollout.rows["trajectory"].dtype == torch.bfloat16
    rows = unfolded(policy, rollout)
    assert rows["old_logp"].dtype == torch.float32
    # Kernels of another batch shape round differently, so only whole chunks replay exactly.
    with torch.no_grad():
        replayed = policy.log_probs(rollout.rows).logp
    assert float((replayed - rollout.old_logp).abs().median()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_trajectories_score_like_their_steps(loaded: dict[str, DiffusionPolicy], family: str) -> None:
    policy = loaded[family]
    rollout = rollout_of(policy)
    with torch.no_grad():
        scores = policy.log_probs(rollout.rows, want=("entropy",))
    assert torch.equal(scores.mask, rollout.mask)
    assert torch.equal(policy.action_mask(rollout.rows), rollout.mask)
    torch.testing.assert_close(scores.logp, rollout.old_logp, rtol=0, atol=1e-5)
    std = policy.schedule.std({name: rollout.rows[name] for name in rollout.rows.columns if name.startswith("step_")})
    torch.testing.assert_close(scores.entropy, std.log() + 0.5 * math.log(2 * math.pi * math.e))


def test_a_step_scores_as_a_literal_gaussian(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    rows = unfolded(policy, rollout_of(policy, guidance_scale=3.0, eta=0.8)).take([3, 11])
    unet, x = policy.pipe.unet, torch.stack(rows["latents"])
    tokens = policy.pipe.tokenizer(
        [*rows["prompt"], "", ""], padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = policy.pipe.text_encoder(tokens)[0]
        noise = unet(x, rows["step_time"].long(), states[:2]).sample
        null = unet(x, rows["step_time"].long(), states[2:]).sample
    guided = null + 3.0 * (noise - null)
    for row in range(2):
        a, b = float(rows["step_level"][row]), float(rows["step_next_level"][row])
        sigma = 0.8 * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x0 = (x[row] - math.sqrt(1 - a) * guided[row]) / math.sqrt(a)
        mean = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * guided[row]
        expected = torch.distributions.Normal(mean, sigma).log_prob(rows["next_latents"][row]).mean()
        assert float(policy.log_probs(rows).logp[row, 0]) == pytest.approx(float(expected), abs=2e-5)


def test_summed_log_probs_are_the_density(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    mean, total = rollout_of(policy), rollout_of(policy, dims="sum")
    assert (mean.dims, total.dims) == ("mean", "sum")
    torch.testing.assert_close(total.old_logp, mean.old_logp * 4 * 8 * 8, rtol=1e-4, atol=1e-2)
    rows = unfolded(policy, total)
    torch.testing.assert_close(policy.log_probs(rows.take([0, 9])).logp.detach(), rows["old_logp"][[0, 9]], rtol=1e-5, atol=1e-2)
    with pytest.raises(ValueError, match="mean and sum"):
        policy.log_probs(Rows.concat([rows.take([0]), unfolded(policy, mean).take([0])]))


@pytest.mark.parametrize("family", ["sd_epsilon", "sdxl", "sd3"])
def test_samples_do_not_depend_on_how_they_are_batched(loaded: dict[str, DiffusionPolicy], family: str) -> None:
    whole = rollout_of(loaded[family], rows_per_forward=64)
    parts = rollout_of(loaded[family], rows_per_forward=4)
    torch.testing.assert_close(whole.rows["trajectory"], parts.rows["trajectory"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.old_logp, parts.old_logp, rtol=0, atol=1e-4)
    other = rollout_of(loaded[family], seed=1)
    assert not torch.allclose(whole.rows["trajectory"][:, 0], other.rows["trajectory"][:, 0])


def test_a_group_can_start_from_one_latent(loaded: dict[str, DiffusionPolicy]) -> None:
    path = rollout_of(loaded["sd_epsilon"], n=3, same_initial_noise=True).rows["trajectory"]
    assert torch.equal(path[0, 0], path[1, 0])
    assert torch.equal(path[3, 0], path[5, 0])
    assert not torch.equal(path[0, 0], path[3, 0])
    assert not torch.equal(path[0, 1], path[1, 1])


@pytest.mark.parametrize(("family", "options"), [
    ("sd_epsilon", {"eta": 0.0}), ("sd_v_prediction", {"eta": 0.0}), ("sdxl", {"eta": 0.0}), ("sd3", {"noise_level": 0.0}),
])
def test_deterministic_sampling_is_that_of_the_diffusers_pipeline(
    loaded: dict[str, DiffusionPolicy], folders: dict[str, Path], family: str, options: dict[str, float],
) -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline

    policy = loaded[family]
    start = rollout_of(policy, n=1).rows["trajectory"][:, 0]
    rollout = rollout_of(policy, n=1, **options)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    peer = DiffusionPipeline.from_pretrained(folders[family], **absent)
    if family != "sd3":
        peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    peer.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "original_size": (16, 16)} if family == "sdxl" else {"height": 16, "width": 16}
    latents = peer(PROMPTS, latents=start, num_inference_steps=5, guidance_scale=3.0, output_type="latent", **size).images
    torch.testing.assert_close(rollout.rows["latents"], latents, rtol=1e-3, atol=1e-3)
    pictures = peer(PROMPTS, latents=start, num_inference_steps=5, guidance_scale=3.0, **size).images
    difference = [(torch.tensor(list(a.tobytes())).int() - torch.tensor(list(b.tobytes())).int()).abs().max()
                  for a, b in zip(rollout.samples, pictures)]
    assert max(difference) <= 1


def test_a_deterministic_rollout_has_no_actions(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    rollout = rollout_of(policy, eta=0.0)
    assert not bool(rollout.mask.any())
    assert bool((rollout.old_logp == 0).all())
    with pytest.raises(ConfigError, match=r"sampling\.eta"):
        unfolded(policy, rollout)
    draw = policy.draw(rollout.rows, generator(0))
    assert policy.log_probs(rollout.rows, draw=draw).logp.shape == (6, 1)


def test_a_last_step_without_noise_is_kept_but_is_no_action(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    policy = DiffusionPolicy.from_pretrained(save_tiny_sd(tmp_path / "one", scheduler=scheduler), device="cpu")
    rollout = rollout_of(policy)
    assert rollout.rows["trajectory"].shape[1] == 6
    assert bool(rollout.mask[:, :-1].all())
    assert not bool(rollout.mask[:, -1].any())
    assert bool((rollout.old_logp[:, -1] == 0).all())
    rows = unfolded(policy, rollout)
    assert sorted(set(rows["step_index"].tolist())) == [0, 1, 2, 3]
    assert replay_error(policy, rows, 5) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(rollout.rows).logp, rollout.old_logp, rtol=0, atol=1e-5)


# -- unfolding ---------------------------------------------------------------------------------------------------------


def test_unfolding_takes_each_step_once_in_random_order(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    rollout = rollout_of(policy)
    rollout.ref_logp = rollout.old_logp - 1
    rollout.columns["label"] = list(range(6))
    rows = unfolded(policy, rollout)
    sample = rows["advantages"].long()
    assert sorted(zip(sample.tolist(), rows["step_index"].tolist())) == [(i, s) for i in range(6) for s in range(5)]
    orders = {tuple(rows["step_index"][sample == i].tolist()) for i in range(6)}
    assert len(orders) > 1
    assert torch.equal(rows["group"], rollout.group[sample])
    assert torch.equal(rows["label"], sample)
    assert torch.equal(rows["ref_logp"], rows["old_logp"] - 1)
    assert torch.equal(rows["old_logp"][:, 0], rollout.old_logp[sample, rows["step_index"]])
    storage = rollout.rows["trajectory"].untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == storage for view in rows["latents"])
    again = unfolded(policy, rollout)
    assert torch.equal(again["step_index"], rows["step_index"])


@pytest.mark.parametrize(("fraction", "kept"), [(0.6, 3), (0.2, 1), (0.01, 1)])
def test_unfolding_a_fraction_of_the_steps(loaded: dict[str, DiffusionPolicy], fraction: float, kept: int) -> None:
    rows = unfolded(loaded["sd_epsilon"], rollout_of(loaded["sd_epsilon"]), fraction)
    assert len(rows) == 6 * kept
    assert len({(int(a), int(s)) for a, s in zip(rows["advantages"], rows["step_index"])}) == 6 * kept


def test_unfolding_reads_advantages_per_step_and_skips_masked_samples(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    rollout = rollout_of(policy)
    rollout.mask[2] = False
    rollout.columns["advantages"] = list(torch.arange(30.0).view(6, 5))
    rows = policy.unfold(rollout, fraction=1.0, generator=generator(0))
    assert len(rows) == 25
    assert torch.equal(rows["advantages"] % 5, rows["step_index"].float())
    assert 2 not in (rows["advantages"] // 5).int().tolist()
    del rollout.columns["advantages"]
    with pytest.raises(DataError, match="advantages"):
        policy.unfold(rollout, fraction=1.0, generator=generator(0))


def test_clean_rows_are_the_final_latents(loaded: dict[str, DiffusionPolicy]) -> None:
    for family in ("sd_epsilon", "sdxl"):
        policy = loaded[family]
        rollout = rollout_of(policy)
        rows = policy.clean_rows(rollout)
        assert torch.equal(rows["latents"], rollout.rows["trajectory"][:, -1])
        assert policy.log_probs(rows, draw=policy.draw(rows, generator(0))).logp.shape == (6, 1)


# -- denoising errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_of_a_picture_is_minus_half_its_denoising_error(loaded: dict[str, DiffusionPolicy], family: str) -> None:
    policy = loaded[family]
    rows = policy.encode_rows(examples())
    draw = policy.draw(rows, generator(3))
    assert draw is not None
    draw = DiffusionDraw(draw.timesteps, draw.noise, torch.zeros(4, dtype=torch.bool))
    x0, noise = rows["latents"], draw.noise
    if family == "sd3":
        sigma = policy.pipe.scheduler.sigmas[draw.timesteps].view(-1, 1, 1, 1)
        noisy, target = (1 - sigma) * x0 + sigma * noise, noise - x0
        embeds, _, pooled, _ = policy.pipe.encode_prompt(
            [e["prompt"] for e in examples()], None, None, device="cpu", do_classifier_free_guidance=False)
        with torch.no_grad():
            pred = policy.pipe.transformer(
                noisy, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=1000 * sigma.flatten()).sample
    else:
        peer = policy.pipe.scheduler
        alpha = peer.alphas_cumprod[draw.timesteps].view(-1, 1, 1, 1)
        noisy = peer.add_noise(x0, noise, draw.timesteps)
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0 if family == "sd_v_prediction" else noise
        with torch.no_grad():
            added = None
            if family == "sdxl":
                embeds, _, pooled, _ = policy.pipe.encode_prompt(
                    [e["prompt"] for e in examples()], device="cpu", do_classifier_free_guidance=False)
                added = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 4)}
            else:
                embeds, _ = policy.pipe.encode_prompt([e["prompt"] for e in examples()], "cpu", 1, False)
            pred = policy.pipe.unet(noisy, draw.timesteps, embeds, added_cond_kwargs=added).sample
    error = ((pred - target) ** 2).mean((1, 2, 3))
    scores = policy.log_probs(rows, draw=draw)
    assert scores.logp.dtype == torch.float32
    assert scores.mask.shape == (4, 1)
    torch.testing.assert_close(scores.logp[:, 0].detach(), -0.5 * error, rtol=1e-4, atol=1e-5)


def test_the_scale_and_space_of_the_error(folders: dict[str, Path]) -> None:
    policy = DiffusionPolicy.from_pretrained(folders["sd_v_prediction"], device="cpu")
    rows = policy.encode_rows(examples())
    draw = policy.draw(rows, generator(3))
    assert draw is not None
    half = policy.log_probs(rows, draw=draw).logp
    policy.error_scale = 1.0
    torch.testing.assert_close(policy.log_probs(rows, draw=draw).logp, 2 * half)
    policy.error_space = "epsilon"  # MSE_v = MSE_eps / alpha_bar
    alpha = policy.pipe.scheduler.alphas_cumprod[draw.timesteps]
    torch.testing.assert_close(policy.log_probs(rows, draw=draw).logp[:, 0], 2 * half[:, 0] * alpha, rtol=1e-3, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_draws_do_not_depend_on_the_split(loaded: dict[str, DiffusionPolicy], sizes: list[int], seed: int) -> None:
    rows = Rows({"latents": torch.zeros(sum(sizes), 4, 8, 8)})
    for family in ("sd_epsilon", "sd3"):
        policy = loaded[family]
        whole = policy.draw(rows, generator(seed))
        shared, start = generator(seed), 0
        for size in sizes:
            part = policy.draw(rows.take(range(start, start + size)), shared)
            taken = whole.take(range(start, start + size))  # type: ignore[union-attr]
            assert part is not None
            assert torch.equal(part.timesteps, taken.timesteps)
            assert torch.equal(part.noise, taken.noise)
            assert torch.equal(part.drop_caption, taken.drop_caption)
            start += size


def test_scores_do_not_depend_on_the_split(loaded: dict[str, DiffusionPolicy]) -> None:
    for family in FAMILIES:
        policy = loaded[family]
        rows = policy.encode_rows(examples(5))
        draw = policy.draw(rows, generator(0))
        assert draw is not None
        with torch.no_grad():
            whole = policy.log_probs(rows, draw=draw).logp
            parts = [policy.log_probs(rows.take(at), draw=draw.take(at)).logp for at in ([0, 1], [2], [3, 4])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_captions_are_dropped_as_often_as_asked_and_for_both_sides_of_a_pair(policy: DiffusionPolicy) -> None:
    rows = Rows({"chosen_latents": torch.zeros(2000, 1, 1, 1)})
    draw = policy.draw(rows, generator(0))
    assert draw is not None
    share = float(draw.drop_caption.double().mean())
    assert abs(share - 0.2) < 5 * (0.16 / 2000) ** 0.5
    both = draw.repeat(2)
    assert torch.equal(both.drop_caption[:2000], both.drop_caption[2000:])
    assert torch.equal(both.timesteps[:2000], both.timesteps[2000:])
    assert torch.equal(both.noise[:2000], both.noise[2000:])
    policy.caption_dropout = 0.0
    assert not bool(policy.draw(rows, generator(0)).drop_caption.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["sd_epsilon", "sd3"])
def test_a_dropped_caption_is_the_empty_prompt(loaded: dict[str, DiffusionPolicy], family: str) -> None:
    policy = loaded[family]
    rows = policy.encode_rows(examples(3))
    empty = policy.encode_rows([{**example, "prompt": ""} for example in examples(3)])
    draw = policy.draw(rows, generator(1))
    assert draw is not None
    dropped = DiffusionDraw(draw.timesteps, draw.noise, torch.tensor([True, False, True]))
    kept = DiffusionDraw(draw.timesteps, draw.noise, torch.zeros(3, dtype=torch.bool))
    with torch.no_grad():
        mixed, with_text, without = (
            policy.log_probs(*pair[:1], draw=pair[1]).logp for pair in ((rows, dropped), (rows, kept), (empty, kept)))
    torch.testing.assert_close(mixed[[0, 2]], without[[0, 2]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], with_text[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(with_text[0], without[0], atol=1e-6)


def test_the_null_condition_of_sdxl_is_zero(loaded: dict[str, DiffusionPolicy]) -> None:
    null = loaded["sdxl"].denoiser.null(2)
    assert all(bool((value == 0).all()) for value in null.values())
    assert bool((loaded["sd_epsilon"].denoiser.null(2)["prompt_embeds"] != 0).any())


def test_pairs_share_their_draw_and_may_have_captions_of_their_own(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    pairs = [{"prompt": PROMPTS[i], "chosen": noise_image(i), "rejected": noise_image(9 - i), "margin": 0.5} for i in range(3)]
    rows = policy.encode_rows(pairs)
    assert {"chosen_latents", "rejected_latents", "prompt_embeds", "margin"} == set(rows.columns)
    blocks = Rows.concat([rows.field("chosen"), rows.field("rejected")])
    draw = policy.draw(rows.field("chosen"), generator(0))
    assert draw is not None
    joint = policy.log_probs(blocks, draw=draw.repeat(2)).logp
    apart = policy.log_probs(rows.field("rejected"), draw=draw).logp
    torch.testing.assert_close(joint[3:], apart, rtol=1e-5, atol=1e-6)

    same = [{**pair, "chosen_caption": pair["prompt"], "rejected_caption": pair["prompt"]} for pair in pairs]
    dual = policy.encode_rows(same)
    assert {"chosen_prompt_embeds", "rejected_prompt_embeds"} < set(dual.columns)
    for field in ("chosen", "rejected"):
        scores = policy.log_probs(dual.field(field), draw=draw).logp
        assert torch.equal(scores, policy.log_probs(rows.field(field), draw=draw).logp)
    other = policy.encode_rows([{**pair, "rejected_caption": PROMPTS[0] + " on the left"} for pair in same])
    assert not torch.equal(policy.log_probs(other.field("rejected"), draw=draw).logp, apart)
    assert torch.equal(policy.log_probs(other.field("chosen"), draw=draw).logp,
                       policy.log_probs(rows.field("chosen"), draw=draw).logp)


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_network_and_nothing_else(folders: dict[str, Path], family: str) -> None:
    policy = DiffusionPolicy.from_pretrained(folders[family], device="cpu", caption_dropout=0.0)
    rows = policy.encode_rows(examples())
    (-policy.log_probs(rows, draw=policy.draw(rows, generator(0))).logp).mean().backward()
    steps = unfolded(policy, rollout_of(policy, n=1, steps=3))
    (-policy.log_probs(steps).logp).mean().backward()
    zero = [name for name, p in policy.module.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    # Key biases cancel in a softmax; SD3's last block reads the text but gives none, so its text queries go nowhere.
    assert [name for name in zero if "bias" not in name and name != "transformer_blocks.1.attn.add_q_proj.weight"] == []
    frozen = [policy.pipe.vae, policy.pipe.text_encoder]
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())


def test_guidance_can_leave_the_unconditional_half_without_gradient(policy: DiffusionPolicy) -> None:
    rows = unfolded(policy, rollout_of(policy, n=1)).take([0, 4, 8])

    def gradient() -> Tensor:
        policy.module.zero_grad()
        scores = policy.log_probs(rows).logp
        scores.sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])

    both, value = gradient(), policy.log_probs(rows).logp
    policy.denoiser.guidance_gradient = "cond_only"
    assert torch.equal(policy.log_probs(rows).logp, value)
    conditional = gradient()
    assert not torch.allclose(conditional, both, rtol=1e-2)


def test_lora_alone_is_trained(policy: DiffusionPolicy) -> None:
    add_lora(policy.module)
    rows = policy.encode_rows(examples())
    policy.log_probs(rows, draw=policy.draw(rows, generator(0))).logp.sum().backward()
    assert {name for name, p in policy.module.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.module.named_parameters() if "lora_" in name}


def test_scoring_without_gradients_is_in_evaluation_mode(policy: DiffusionPolicy) -> None:
    add_lora(policy.module)
    for part in policy.module.modules():
        if type(part).__name__ == "Dropout" or hasattr(part, "lora_dropout"):
            for dropout in getattr(part, "lora_dropout", {}).values():
                dropout.__class__, dropout.p, dropout.inplace = torch.nn.Dropout, 0.5, False
    rollout = rollout_of(policy)
    assert policy.module.training
    assert replay_error(policy, unfolded(policy, rollout), 5) < 1e-5


# -- the module ----------------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.parallel.DistributedDataParallel):
    """What a wrapped module looks like, without processes."""

    def __init__(self, module: torch.nn.Module) -> None:
        torch.nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


def test_a_wrapped_network_scores_and_saves(policy: DiffusionPolicy, tmp_path: Path) -> None:
    rows = policy.encode_rows(examples())
    draw = policy.draw(rows, generator(0))
    before, identity = policy.log_probs(rows, draw=draw).logp, policy.identity()
    policy.replace_module(Wrapper(policy.module))
    assert torch.equal(policy.log_probs(rows, draw=draw).logp, before)
    assert policy.identity() == identity
    policy.save_pretrained(tmp_path / "wrapped")
    reloaded = DiffusionPolicy.from_pretrained(tmp_path / "wrapped", device="cpu")
    assert torch.equal(reloaded.log_probs(rows, draw=draw).logp, before)


def test_a_peft_model_scores_and_saves_like_injected_adapters(
    policy: DiffusionPolicy, folders: dict[str, Path], tmp_path: Path,
) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    policy.replace_module(get_peft_model(policy.module, config))  # type: ignore[arg-type]
    rows = policy.encode_rows(examples())
    draw = policy.draw(rows, generator(0))
    expected = policy.log_probs(rows, draw=draw).logp
    policy.save_pretrained(tmp_path / "lora")
    reloaded = DiffusionPolicy.from_pretrained(folders["sd_epsilon"], device="cpu", adapter=tmp_path / "lora")
    torch.testing.assert_close(reloaded.log_probs(rows, draw=draw).logp, expected)


def test_gradient_checkpointing_changes_no_gradient(policy: DiffusionPolicy) -> None:
    rows = policy.encode_rows(examples())
    draw = policy.draw(rows, generator(0))
    gradients = []
    for enable in (False, True):
        policy.module.zero_grad()
        policy.gradient_checkpointing(enable)
        policy.log_probs(rows, draw=draw).logp.sum().backward()
        gradients.append([p.grad.clone() for p in policy.module.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_identity_changes_with_every_weight_and_with_the_adapters_strength(policy: DiffusionPolicy) -> None:
    base = policy.identity()
    assert policy.identity() == base
    add_lora(policy.module, rank=2, alpha=2)
    adapted = policy.identity()
    assert adapted != base
    with adapters_disabled(policy.module):
        assert policy.identity() == base
    for part in policy.module.modules():
        if hasattr(part, "scaling"):
            part.scaling["default"] *= 2
    assert policy.identity() not in (base, adapted)


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_scores_refuse_what_has_no_meaning(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    rows = policy.encode_rows(examples(2))
    draw = policy.draw(rows, generator(0))
    with pytest.raises(ValueError, match="draw"):
        policy.log_probs(rows)
    with pytest.raises(ValueError, match="temperature"):
        policy.log_probs(rows, draw=draw, temperature=0.5)
    with pytest.raises(ValueError, match="lse"):
        policy.log_probs(rows, draw=draw, want=("lse",))
    with pytest.raises(ValueError, match="shape"):
        policy.log_probs(rows, draw=DiffusionDraw(torch.zeros(2), torch.zeros(2, 4, 4, 4), torch.zeros(2)))
    with pytest.raises(DataError, match="no latents"):
        policy.draw(Rows({"prompt": ["a"]}), generator(0))
    assert policy.draw(rollout_of(policy).rows, generator(0)) is None


def test_sampling_refuses_prompts_and_sizes_it_cannot_use(loaded: dict[str, DiffusionPolicy]) -> None:
    policy = loaded["sd_epsilon"]
    with pytest.raises(DataError, match="prompt of row 1 is a list"):
        policy.sample(["a", [{"role": "user", "content": "a"}]], 1, DiffusionSampling(steps=2), generator(0))
    with pytest.raises(ConfigError, match="multiple of 2"):
        policy.sample(["a"], 1, DiffusionSampling(steps=2, height=17), generator(0))
    with pytest.raises(ConfigError, match="at least one"):
        policy.sample([], 1, DiffusionSampling(steps=2), generator(0))
    assert policy.sample(["a"], 1, DiffusionSampling(steps=2, height=8, width=24), generator(0)).samples[0].size == (24, 8)


@pytest.mark.parametrize(("options", "key"), [
    ({"caption_dropout": 1.5}, "caption_dropout"), ({"error_space": "latent"}, "error_space"),
    ({"guidance_gradient": "null"}, "guidance_gradient"), ({"error_scale": 0.0}, "error_scale"),
    ({"resolution": 15}, "multiple"),
])
def test_options_outside_their_range_are_named(loaded: dict[str, DiffusionPolicy], options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        DiffusionPolicy(loaded["sd_epsilon"].pipe, **options)


@pytest.mark.parametrize(("unet", "reason"), [
    ({"in_channels": 9}, "inpainting"), ({"time_cond_proj_dim": 8}, "distilled"), ({"num_class_embeds": 3}, "class"),
])
def test_networks_of_another_kind_are_refused(tmp_path: Path, unet: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        DiffusionPolicy.from_pretrained(save_tiny_sd(tmp_path / "other", **unet), device="cpu")
