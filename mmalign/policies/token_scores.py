"""From a causal language model and a :class:`TokenLayout` to scores of every action.

The last hidden states are caught by a hook on the backbone while the module's *own* forward runs, so adapters, prompt
tuning, autocast and DistributedDataParallel all do what they do in ordinary training; the output head is then applied
to the scored positions only (:func:`mmalign.core.output_head.score_positions`). Before the first score two things are
checked on a few tokens: that hidden states times head give the model's own logits, and that the model honours an
explicit attention mask. What fails is not used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.output_head import OutputHead, score_positions
from mmalign.data.packing import IGNORED, TokenLayout, layout_padded, layout_shared_prefix
from mmalign.data.rows import Rows
from mmalign.policies.modules import active_adapters, evaluating, is_peft_model, prompt_learning, unwrap

logger = logging.getLogger(__name__)

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take an explicit ``[R, 1, T, T]`` mask."""


def language_model(module: nn.Module) -> Any:
    """The transformers model inside every wrapper and ``PeftModel``."""
    inner = unwrap(module)
    return inner.get_base_model() if is_peft_model(inner) else inner


class TokenScores:
    """Hidden states and action scores of one module, however it is wrapped."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.model = language_model(module)
        self.config = self.model.config.get_text_config()
        self.forward_names = frozenset(inspect.signature(self.model.forward).parameters)
        self._dense: bool | None = None
        self._masks: bool | None = None

    # -- what the model can do -------------------------------------------------------------------------------------

    @property
    def dense(self) -> bool:
        """Whether logits must be taken from the model itself, position by position."""
        if self._dense is None:
            self._dense = not self._reproduces_logits()
            if self._dense:
                logger.warning(
                    "%s computes its logits in a way that hidden states and output head do not reproduce; scoring keeps "
                    "the full [rows, tokens, vocabulary] logits, which takes much more memory", type(self.model).__name__)
        return self._dense

    def takes_masks(self, longest: int) -> bool:
        """Whether rows of up to ``longest`` tokens may be laid out behind an explicit attention mask."""
        if prompt_learning(self.module) is not None or self.config._attn_implementation not in MASKED_ATTENTION:
            return False
        if getattr(self.model, "_is_stateful", False) or longest > _attention_window(self.config):
            return False
        if self._masks is None:
            self._masks = self._honours_masks()
        return self._masks

    def _probe_rows(self) -> Rows:
        size = self.config.vocab_size
        ids = [[(7 * i + j) % size for i in range(5)] for j in (1, 1, 4)]
        ids[1][-2:] = [(ids[1][-1] + 1) % size, (ids[1][-1] + 2) % size]
        return Rows({"input_ids": ids, "labels": [[IGNORED] * 3 + row[3:] for row in ids]})

    def _reproduces_logits(self) -> bool:
        with torch.no_grad():
            head = self.output_head()
            if head is None or self._backbone() is None:
                return False
            own = self._probe(layout_padded(self._probe_rows()), keep_logits=True)
            if own.hidden is None or own.logits is None:
                return False
            rebuilt = head.logits(own.hidden.to(torch.promote_types(own.hidden.dtype, torch.float32)))
        return _agree(rebuilt, own.logits.to(rebuilt.dtype), own.precision)

    def _honours_masks(self) -> bool:
        rows, results = self._probe_rows(), []
        for layout in (layout_padded(rows), layout_shared_prefix(rows, 64)):
            try:
                own = self._probe(layout, keep_logits=self._backbone() is None)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                logger.info("%s takes no explicit attention mask (%s)", type(self.model).__name__, error)
                return False
            flat = own.logits if own.hidden is None else own.hidden
            assert flat is not None
            results.append((flat.flatten(0, 1)[layout.source.to(flat.device)], own.precision))
        (apart, precision), (together, _) = results
        return _agree(together.float(), apart.float(), precision)

    def _probe(self, layout: TokenLayout, *, keep_logits: bool) -> _Forward:
        # Wrappers are left out: a probe may run on one rank only.
        inner = unwrap(self.module)
        with torch.no_grad(), evaluating(inner):
            return self._call(layout.to(self.device), inner, keep_logits=keep_logits)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's weights."""
        return next(self.model.parameters()).dtype

    # -- hidden states ---------------------------------------------------------------------------------------------

    def hidden(self, layout: TokenLayout) -> Tensor:
        """``[R * T, H]`` last hidden states of a layout on this device, in the graph when gradients are on."""
        hidden = self._call(layout, self.module).hidden
        if hidden is None:
            raise RuntimeError(f"{type(self.model).__name__} ran without calling its backbone; hidden states are not reachable")
        return hidden.flatten(0, 1)

    @torch.no_grad()
    def greedy(self, layout: TokenLayout, *, chunk: int = 256) -> Tensor:
        """``[N]`` int64: the likeliest token at the place of every action, ``chunk`` rows of logits at a time."""
        if self.dense:
            logits = self._call(layout, self.module, keep_logits=True).logits
            assert logits is not None
            likeliest: Tensor = logits.flatten(0, 1)[layout.source].argmax(-1)
            return likeliest
        head = self.output_head()
        assert head is not None
        hidden = self.hidden(layout)[layout.source]
        return torch.cat([head.logits(part).argmax(-1) for part in hidden.split(chunk)] or [layout.target])

    def _backbone(self) -> nn.Module | None:
        backbone = self.model.base_model
        return None if backbone is self.model else backbone

    def _call(self, layout: TokenLayout, module: nn.Module, *, keep_logits: bool = False) -> _Forward:
        inputs: dict[str, Any] = {"input_ids": layout.input_ids, "use_cache": False}
        if prompt_learning(self.module) is None and "position_ids" in self.forward_names:
            inputs["position_ids"] = layout.position_ids
        if layout.attention_mask is not None:
            inputs["attention_mask"] = self.attention_bias(layout.attention_mask)
        if not keep_logits and "logits_to_keep" in self.forward_names:
            inputs["logits_to_keep"] = 1
        caught: list[Tensor] = []
        precisions: list[torch.dtype] = []

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(output[0])
            device = output[0].device.type
            precisions.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output[0].dtype)

        backbone = self._backbone()
        handle = None if backbone is None else backbone.register_forward_hook(catch)
        try:
            output = module(**inputs)
        finally:
            if handle is not None:
                handle.remove()
        length = layout.input_ids.shape[1]  # prompt tuning puts its virtual tokens in front
        hidden = caught[-1][:, -length:] if caught else None
        if hidden is not None and not keep_logits:
            hidden = hidden.to(precisions[-1])  # the head multiplies in the precision the model itself would
        return _Forward(hidden, output.logits[:, -length:] if keep_logits else None, (precisions or [self.dtype])[-1])

    def attention_bias(self, allowed: Tensor) -> Tensor:
        """A bool mask (True = attend) in the form the model's attention takes: bool, or additive for eager."""
        if self.config._attn_implementation != "eager":
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, torch.finfo(self.dtype).min)

    # -- scores ----------------------------------------------------------------------------------------------------

    def output_head(self) -> OutputHead | None:
        """The head as weight, bias, scale and cap, adapters included; None when it is not a plain linear map."""
        layer = self.model.get_output_embeddings()
        parts = None if layer is None else effective_linear(layer)
        if parts is None:
            return None
        weight, bias = parts
        return OutputHead(weight, bias, scale=_logit_scale(self.config), soft_cap=_soft_cap(self.config))

    def score(
        self, layout: TokenLayout, *, temperature: float, want: Iterable[str],
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """``({"logp": [N], **wanted}, hidden states [N, H] of the predicting positions)`` of a layout on this device."""
        if self.dense:
            logits = self._call(layout, self.module, keep_logits=True).logits
            assert logits is not None
            picked = logits.flatten(0, 1)[layout.source]
            return dense_scores(picked, layout.target, temperature=temperature, want=want), None
        head = self.output_head()
        assert head is not None
        hidden = self.hidden(layout)[layout.source]
        return score_positions(hidden, head, layout.target, temperature=temperature, want=want), hidden


@dataclass(frozen=True)
class _Forward:
    """What one pass gave."""

    hidden: Tensor | None
    """``[R, T, H]`` last hidden states."""
    logits: Tensor | None
    """``[R, T, V]``, when they were asked for."""
    precision: torch.dtype
    """That of the matrix products: the hidden states' own, or autocast's."""


def dense_scores(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, want: Iterable[str] = ()) -> dict[str, Tensor]:
    """What :func:`score_positions` gives, from ready logits ``[N, V]``."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    lse = logits.logsumexp(-1)
    log_p = logits - lse[:, None]
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    statistics = {
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "lse": lambda: lse,
        "mean_logp": lambda: log_p.mean(-1),
        "sum_p2": lambda: log_p.detach().exp().square().sum(-1),
        "correct": lambda: (logits.gather(1, targets[:, None]).squeeze(1) >= logits.amax(-1)).to(logp.dtype),
    }
    return {"logp": logp, **{name: statistics[name]() for name in want}}


def effective_linear(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """``(weight [V, H], bias)`` a linear layer multiplies by, adapters of peft included; None if it is anything else."""
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        trained = [name for name in active_adapters(layer) if name in layer.modules_to_save and not layer.disable_adapters]
        return effective_linear(layer.modules_to_save[trained[0]] if trained else layer.original_module)
    if hasattr(layer, "token_adapter"):
        if layer.token_adapter.disable_adapters:
            return effective_linear(layer.original_module)
        plain = effective_linear(layer.original_module)
        adapter = layer.token_adapter
        return None if plain is None else (adapter.get_merged_weights(adapter.active_adapters), plain[1])
    if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
        return _lora_linear(layer)
    if not isinstance(layer, nn.Linear) or hasattr(layer, "base_layer"):
        return None
    weight = layer.weight
    if not weight.is_floating_point() or weight.shape != (layer.out_features, layer.in_features):
        return None  # quantised storage
    return weight, layer.bias


def _lora_linear(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    plain = effective_linear(layer.get_base_layer())
    if plain is None or layer.disable_adapters or layer.merged:
        return plain
    weight, bias = plain
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name, False):
            return None  # DoRA and its like are not a sum of two matrices
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def _logit_scale(config: Any) -> float:
    """The factor between ``W h`` and the logits, by the names that model families use."""
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        return float(scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None):
        return float(config.lm_head_multiplier)
    return 1.0


def _soft_cap(config: Any) -> float | None:
    cap = getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None


def _attention_window(config: Any) -> float:
    """Longest row for which every layer is plain causal attention (0: some layer is none)."""
    kinds = getattr(config, "layer_types", None)
    windows = {
        "full_attention": float("inf"),
        "attention": float("inf"),
        "sliding_attention": getattr(config, "sliding_window", None) or float("inf"),
        "chunked_attention": getattr(config, "attention_chunk_size", None) or float("inf"),
    }
    if kinds:
        return float(min(windows.get(kind, 0) for kind in kinds))
    return float(getattr(config, "sliding_window", None) or float("inf"))


def _agree(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    scale = max(1.0, float(right.abs().max()))
    return left.shape == right.shape and float((left - right).abs().max()) <= tolerance * scale
