"""What self-sampling is for: with one reference per problem, pass@k for large k and the number of different right programs grow.

A two-layer Llama stands in for a pretrained model: it has seen other word problems, each with one of several equivalent
programs. It then learns 128 problems with the same form of program as reference everywhere, in three ways: maximum likelihood,
MLE-Aug with fully correct programs only, and with partially correct ones, 2 samples of a problem per rollout.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.core.seeding import generator
from mmalign.data.straight_line import ProgramError, read_program
from mmalign.data.word_programs import make_word_programs
from mmalign.stages import make_plan, run_plan
from mmalign.training.tracking import read_metrics

ARMS: dict[str, dict[str, Any]] = {
    "mle": {"loss": {"name": "mle"}},
    "full": {"loss": {"name": "mle_aug"}, "solutions": {"partial": False, "marg_set_size": 10}},
    "partial": {"loss": {"name": "mle_aug"}, "solutions": {"partial": True, "marg_set_size": 10}},
}
DATA = {"path": "asset:word_programs", "arguments": {"largest": 9, "short": True}}
SEEDS = (0, 1, 2)
PIECES = r"[a-z]+\d|\d|[A-Za-z]+|\n| |[^A-Za-z0-9\s]"


def build_llama(folder: Path, *, seed: int, hidden: int = 64) -> Path:
    """A random model whose tokens are digits, variables, words and signs."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text for row in make_word_programs(300, largest=9, short=True) for text in (row["prompt"], *row["programs"])]
    words = sorted({piece for text in texts for piece in re.findall(PIECES, text)} | set("0123456789"))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<eos>", "<unk>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                        model_max_length=128, clean_up_tokenization_spaces=False)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None,
                         eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator(seed, "init", "program_llama", name))
    model.generation_config = GenerationConfig(eos_token_id=[1], pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def study(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Arm -> pass@k, different right programs per problem, and what its training sampled and kept."""
    common = {"method": "self_sampling", "data": {**DATA, "limit": 256, "part": "2/2"}, "encoding": {"max_length": 128},
              "steps": 48,
              "sampling": {"temperature": 0.8, "max_new_tokens": 32, "rows_per_forward": 256},
              "optimizers": [{"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}]}
    small = {"prompts_per_rollout": 16, "completions_per_prompt": 1}
    stages: list[dict[str, Any]] = [{**common, "name": "warm", "model": {"path": str(build_llama(folder / "base", seed=seed))},
                                     "loss": {"name": "mle"}, "batch": small, "steps": 250,
                                     "data": {"path": DATA["path"], "limit": 256, "part": "1/2",
                                              "arguments": {"largest": 9, "short": True, "varied": True}},
                                     "optimizers": [{"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}]}]
    for arm, options in ARMS.items():
        batch = small if arm == "mle" else {"prompts_per_rollout": 64, "completions_per_prompt": 2, "examples_per_update": 32}
        model = {"path": "${stages.warm.model}"}
        stages.append({**common, "name": arm, "model": model, "batch": batch, **options})
        stages.append({
            "name": f"{arm}-measured", "kind": "evaluate", "model": {"path": f"${{stages.{arm}.model}}"},
            "data": {**DATA, "split": "test", "limit": 30}, "rewards": [{"name": "straight_line_match"}], "seed": seed,
            "completions_per_prompt": 50, "sampling": {"temperature": 0.8, "max_new_tokens": 32, "rows_per_forward": 1024},
            "pass_at": [1, 5, 10, 50],
        })
    plan = make_plan({"run_dir": str(folder / "run"), "seed": seed, "stages": stages}, config_folder=folder)
    manifests = run_plan(plan, quiet=True)
    found = {}
    for arm in ARMS:
        manifest = manifests[f"{arm}-measured"]
        figures = {name.partition("/")[0]: value for name, value in manifest["metrics"].items() if name.endswith("line_match")
                   and name.startswith("pass@")}
        log = read_metrics(Path(manifests[arm]["outputs"]["metrics"]))
        found[arm] = {**figures, "different": different_programs(Path(manifest["outputs"]["samples"])),
                      "sampled_tokens": log[-1]["sampled_tokens"], "kept": log[-1]["solutions/full"],
                      "tokens_to_1.5": next((r["sampled_tokens"] for r in log if r["solutions/full"] >= 1.5), math.inf)}
    return found


def different_programs(samples: Path) -> float:
    """Different right programs per problem."""
    right: dict[str, set[Any]] = {}
    for line in (samples / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        programs = right.setdefault(record["prompt"], set())
        if record["rewards"]["straight_line_match"] == 1:
            try:
                programs.add(read_program(record["completion"]))
            except ProgramError:
                continue
    return sum(map(len, right.values())) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_more_right_programs_are_found_and_written(seed: int, tmp_path: Path) -> None:
    arms = study(tmp_path, seed)
    for arm, figures in arms.items():
        print(f"seed {seed} {arm}", {name: round(value, 3) for name, value in figures.items()}, flush=True)
    for arm in ("full", "partial"):
        assert arms[arm]["kept"] > 1.0  # other right programs than the reference were found
        assert arms[arm]["different"] > arms["mle"]["different"]
