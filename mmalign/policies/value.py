"""Value functions of a text policy: a head on the policy's own hidden states, or a model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from mmalign.config import Options
from mmalign.core.logprobs import ActionScores
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.policies.causal_lm import CausalLMPolicy
from mmalign.policies.heads import Head
from mmalign.policies.loading import ModelOptions, base_of_adapter, resolve_model_path
from mmalign.policies.modules import evaluating, is_peft_model, unwrap
from mmalign.policies.pretrained import load_causal_lm


class ValueOptions(Options):
    """The value function: what it is, where it starts, and its loss."""

    kind: Literal["separate", "shared"] = "separate"
    """separate: a model of its own (module "value"), trained in full. shared: a linear head on the policy's hidden states;
    cheaper, but the value loss then moves the policy's weights too."""
    path: str | None = None
    """separate: the model it starts from, a language model (the head then starts at 0) or a reward model (whose head it
    takes over); null is the model that the policy starts from."""
    coef: float = Field(default=0.1, validation_alias=AliasChoices("coef", "vf_coef"))
    """Weight of the value loss."""
    clip: float | None = Field(default=0.2, validation_alias=AliasChoices("clip", "cliprange_value"))
    """New values may move this far from those of the rollout before the loss stops rewarding it; null does not clip."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse values without a meaning."""
        if self.coef <= 0:
            raise ValueError(f"coef must be positive, not {self.coef}: an untrained value function is no baseline; methods "
                             "grpo and rloo need none")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive or null, not {self.clip}")
        if self.kind == "shared" and self.path is not None:
            raise ValueError("path belongs to kind separate; a shared value function lives on the policy's own hidden states")


class ValueFunction(Protocol):
    """``V(s_t)``: the expected return before action t, for every action of a row."""

    want: tuple[str, ...]
    """What the policy's own scores must hold for :meth:`values`."""

    @property
    def module(self) -> nn.Module:
        """What is trained beside the policy."""
        ...

    def replace_module(self, module: nn.Module) -> None:
        """Use the module as accelerate wrapped it."""
        ...

    def values(self, rows: Rows, scores: ActionScores | None = None) -> Tensor:
        """``[B, A]`` float32; ``scores`` are those of the policy on the same rows, where they are known."""
        ...


class SharedValue:
    """A head on the hidden states of the policy, computed in the policy's own forward."""

    want: tuple[str, ...] = ("values",)

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.policy = policy
        weight = next(policy.module.parameters())
        policy.value_head = Head(int(policy.scores.config.hidden_size)).to(weight.device)

    @property
    def module(self) -> nn.Module:
        """The head."""
        assert self.policy.value_head is not None
        return self.policy.value_head

    def replace_module(self, module: nn.Module) -> None:
        """Hand the wrapped head to the policy."""
        self.policy.value_head = module

    def values(self, rows: Rows, scores: ActionScores | None = None) -> Tensor:
        """Those in ``scores``, or of a forward of the policy."""
        scores = scores if scores is not None else self.policy.log_probs(rows, want=self.want)
        assert scores.values is not None
        return scores.values


class ValueNet(nn.Module):
    """A language model whose logits are not read, and the head on its last hidden states."""

    def __init__(self, trunk: nn.Module, head: Head) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, **inputs: Any) -> Any:
        """The trunk's own forward; the head is applied to the scored positions by :class:`SeparateValue`."""
        return self.trunk(**inputs)


class SeparateValue:
    """A value model of its own; it scores rows through the same layouts as a policy."""

    want: tuple[str, ...] = ()

    def __init__(self, trunk: nn.Module, tokenizer: Any, head: Head, *, layout: Any = "auto") -> None:
        self.scorer = CausalLMPolicy(trunk, tokenizer, layout=layout)
        net = ValueNet(trunk, head.to(next(trunk.parameters()).device))
        _freeze_unread_head(trunk)
        self.scorer.scores.module = net.train()

    @property
    def module(self) -> nn.Module:
        """Trunk and head."""
        return self.scorer.scores.module

    def replace_module(self, module: nn.Module) -> None:
        """Compute through the wrapped network."""
        self.scorer.scores.module = module

    def values(self, rows: Rows, scores: ActionScores | None = None) -> Tensor:
        """One forward of the value model; in evaluation mode without gradients."""
        if not torch.is_grad_enabled():
            with evaluating(self.module):
                return self._values(rows)
        return self._values(rows)

    def _values(self, rows: Rows) -> Tensor:
        layout = self.scorer.token_layout(rows).to(self.scorer.device)
        hidden = self.scorer.scores.hidden(layout)[layout.source]
        values: Tensor = layout.scatter(unwrap(self.module).head(hidden))
        return values


def make_value(options: ValueOptions, policy: Policy, model: ModelOptions) -> ValueFunction:
    """The value function of a text policy that was loaded from ``model``.

    Raises ConfigError for policies that are no language models, and when a value model has another vocabulary.
    """
    if not isinstance(policy, CausalLMPolicy):
        raise ConfigError(f"value: a value function needs a language model, not a policy of modality {policy.modality!r}")
    if options.kind == "shared":
        return SharedValue(policy)
    chosen = model if options.path is None else model.model_copy(update={"path": options.path, "adapter": None})
    chosen = chosen.model_copy(update={"device": str(policy.device)})
    trunk, tokenizer, stored = _load_trunk(chosen)
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(f"value.path: {chosen.path} has another vocabulary than the policy, so it cannot read its samples; "
                          "start the value model from a model with the policy's tokenizer")
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if chosen.gradient_checkpointing:
        trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = Head(int(trunk.config.get_text_config().hidden_size))
    if stored is not None:
        with torch.no_grad():
            head.weight.copy_(stored.detach().float())
    return SeparateValue(trunk, tokenizer, head, layout=chosen.layout)


def _load_trunk(options: ModelOptions) -> tuple[Any, Any, Tensor | None]:
    """Model, tokenizer, and the score head of a reward model; adapters are merged, for the value model is trained in full."""
    path = resolve_model_path(options.path, key="value.path")
    if _is_classifier(Path(path)):
        from mmalign.policies.reward_lm import load_reward_lm

        model, tokenizer = load_reward_lm(options.model_copy(update={"path": path, "gradient_checkpointing": False}),
                                          head="stored")
        model = model.merge_and_unload() if is_peft_model(model) else model
        return model, tokenizer, model.score.weight
    adapter = resolve_model_path(options.adapter, key="model.adapter") if options.adapter else None
    model, tokenizer = load_causal_lm(
        path, dtype=options.dtype, device=options.device, revision=options.revision, adapter=adapter,
        trust_remote_code=options.trust_remote_code, attention=options.attention, gguf_file=options.gguf_file)
    return (model.merge_and_unload() if is_peft_model(model) else model), tokenizer, None


def _is_classifier(folder: Path) -> bool:
    if (folder / "adapter_config.json").is_file():
        if json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS":
            return True
        folder = Path(resolve_model_path(base_of_adapter(folder), key="value.path"))
    config = folder / "config.json"
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return any(str(name).endswith("ForSequenceClassification") for name in names or [])


def _freeze_unread_head(trunk: Any) -> None:
    """Output weights that no value depends on get no gradient: optimisers and DistributedDataParallel must not wait for it."""
    used = {id(parameter) for parameter in trunk.base_model.parameters()}
    for parameter in trunk.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
