"""Causal language models as policies: scoring any layout of rows, sampling through a rollout engine, saving."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.data.chat import IGNORED, TextEncoder, TextEncoding, decode_completion
from mmalign.data.packing import PAIRS_PER_TOKEN, LayoutMode, TokenLayout, choose_layout, scored_rows
from mmalign.data.preference import rotate_completions
from mmalign.data.rows import Rows
from mmalign.errors import ConfigError, DataError
from mmalign.policies.base import Draw, Rollout, TextSampling
from mmalign.policies.engines import ENGINES, RolloutEngine, RolloutResult
from mmalign.policies.modules import evaluating, is_adapted, is_peft_model, module_identity, prompt_learning, unwrap
from mmalign.policies.pretrained import load_causal_lm
from mmalign.policies.token_rows import TokenRows
from mmalign.policies.token_scores import TokenScores

logger = logging.getLogger(__name__)


class CausalLMPolicy(TokenRows):
    """A causal language model behind the :class:`~mmalign.policies.base.Policy` contract.

    Rows hold ``input_ids`` and ``labels`` (lists of equal length; -100 = not an action). Column ``a`` of every score is
    the ``a``-th action of the row, whether rows are padded, packed or share their prompts.

    Args:
        module: a transformers causal model, plain or inside a ``PeftModel``.
        tokenizer: its tokenizer.
        encoding: how rows of text become ids and labels.
        layout: ``auto`` takes the cheapest layout that is exact for the model; ``packed`` and ``shared_prefix`` insist
            (ConfigError when the model takes no explicit attention mask).
        engine: name of the rollout engine.
    """

    modality = "text"
    score_columns = ("input_ids", "labels")
    """Columns of a row that its scores depend on."""

    def __init__(
        self, module: nn.Module, tokenizer: Any, *, encoding: TextEncoding | None = None, layout: LayoutMode = "auto",
        engine: str = "hf",
    ) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding or TextEncoding()
        self.layout: LayoutMode = layout
        self.weight_version = 0
        self.value_head: nn.Module | None = None
        """Head on the hidden states of the predicting positions; with it ``want=("values",)`` gives ``scores.values``."""
        self._encoder: TextEncoder | None = None
        self._engine_name = engine
        self.replace_module(module)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = "float32", device: str | torch.device | None = None,
        revision: str | None = None, trust_remote_code: bool = False, attention: str = "sdpa",
        gguf_file: str | None = None, adapter: str | Path | None = None, adapter_trainable: bool = True,
        encoding: TextEncoding | None = None, layout: LayoutMode = "auto", engine: str = "hf",
    ) -> CausalLMPolicy:
        """Load a folder or hub id; see :func:`mmalign.policies.pretrained.load_causal_lm` for what it may hold."""
        module, tokenizer = load_causal_lm(
            path, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code,
            attention=attention, gguf_file=gguf_file, adapter=adapter, adapter_trainable=adapter_trainable,
        )
        policy = cls(module, tokenizer, encoding=encoding, layout=layout, engine=engine)
        logger.info("loaded %s: %s", path, policy.summary())
        return policy

    # -- the module ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The network that is trained, as it is wrapped now."""
        return self.scores.module

    def replace_module(self, module: nn.Module) -> None:
        """Score, sample and save with ``module`` from now on."""
        self.scores = TokenScores(module)
        self.engine: RolloutEngine = ENGINES.get(self._engine_name)(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.scores.device

    @property
    def window(self) -> int | None:
        """Most tokens of a row, virtual ones of prompt tuning taken off; None when the model names no limit."""
        config = self.scores.config
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        known = [int(limit) for limit in limits if limit]
        learning = prompt_learning(self.module)
        return min(known) - (learning.num_virtual_tokens if learning else 0) if known else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion: of the generation config, the tokenizer and the chat template."""
        model = self.scores.model
        found: set[int] = set()
        for source in (getattr(model, "generation_config", None), self.scores.config, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, (list, tuple)) else ({ids} if ids is not None else set())
        return frozenset(int(index) for index in found | set(self.encoder.template.end_ids))

    @property
    def encoder(self) -> TextEncoder:
        """Turns prompts into ids with this policy's tokenizer and template arguments."""
        if self._encoder is None or self._encoder.tokenizer is not self.tokenizer:
            self._encoder = TextEncoder(self.tokenizer, self.encoding.model_copy(update={"append_eos": False}))
        return self._encoder

    def summary(self) -> str:
        """One line: architecture, size, precision, device, attention, adapters, layout."""
        scores = self.scores
        parameters = list(self.module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        adapted = ", adapter" if is_adapted(self.module) else ""
        return (f"{type(scores.model).__name__}, {sum(p.numel() for p in parameters):,} parameters ({trained:,} trained), "
                f"{'/'.join(kinds)} on {self.device}, attention {scores.config._attn_implementation}, "
                f"layout {self.layout}{adapted}")

    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass (or stop doing so)."""
        model = self.scores.model
        if not enable:
            model.gradient_checkpointing_disable()
            return
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if is_adapted(self.module):
            # Frozen embeddings: without this the checkpointed blocks would see no input that needs a gradient.
            model.enable_input_require_grads()

    @contextmanager
    def neftune(self, alpha: float, generator: torch.Generator | None = None) -> Iterator[None]:
        """Uniform noise on the input embeddings of training forwards inside the block (NEFTune, Jain et al. 2023,
        arXiv 2310.05914); never in evaluation mode or without gradients.
        """
        from mmalign.core.supervised import neftune_noise

        def add_noise(layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if not layer.training or not torch.is_grad_enabled():
                return None
            return neftune_noise(output, alpha=alpha, generator=generator)

        handle = self.scores.model.get_input_embeddings().register_forward_hook(add_noise)
        try:
            yield
        finally:
            handle.remove()

    # -- data ------------------------------------------------------------------------------------------------------

    def mismatched_rows(self, rows: Rows) -> Rows:
        """Every prompt with the completion of another row, for KTO's offset."""
        return rotate_completions(rows, max_length=self.encoder.max_length)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def action_mask(self, rows: Rows) -> Tensor:
        """``[B, A]`` bool on the CPU: the actions that :meth:`log_probs` scores."""
        counts = torch.tensor([len(row.actions) for row in scored_rows(rows)], dtype=torch.long)
        width = max(1, int(counts.max())) if len(counts) else 1
        return torch.arange(width) < counts[:, None]

    def token_layout(self, rows: Rows) -> TokenLayout:
        """How ``rows`` would be laid out for a forward pass, on the CPU."""
        longest = max((len(ids) for ids in rows["input_ids"]), default=0)
        window = self.window
        if window is not None and longest > window:
            raise DataError(f"a row has {longest} tokens, more than the model's window of {window}; lower "
                            "encoding.max_length")
        masks = self.layout != "padded" and self.scores.takes_masks(longest)
        if self.layout in ("packed", "shared_prefix") and not masks:
            raise ConfigError(f"model.layout: {self.layout} needs a model that takes an explicit attention mask for rows of "
                              f"{longest} tokens; {type(self.scores.model).__name__} with attention "
                              f"{self.scores.config._attn_implementation!r} does not. Use auto or padded")
        return choose_layout(rows, self.layout, masks=masks, pairs_per_token=PAIRS_PER_TOKEN)

    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """Score every action of every row.

        Args:
            rows: ``input_ids`` and ``labels`` columns.
            draw: not used; text has none.
            temperature: divides the logits.
            want: further fields of the scores (:func:`~mmalign.core.output_head.score_positions`), and ``values`` when
                ``value_head`` is set.

        Returns:
            float32 ``[B, A]`` fields, zero where the mask is False. Without gradients the module is in evaluation mode;
            with them it is in the caller's mode. A row without actions scores 0 and stays connected to the parameters.
        """
        wanted = tuple(dict.fromkeys(want))
        if "values" in wanted and self.value_head is None:
            raise ConfigError("want=('values',) needs a policy with a value_head")
        if not torch.is_grad_enabled():
            with evaluating(self.module):
                return self._log_probs(rows, temperature, wanted)
        return self._log_probs(rows, temperature, wanted)

    def _log_probs(self, rows: Rows, temperature: float, wanted: tuple[str, ...]) -> ActionScores:
        layout = self.token_layout(rows).to(self.device)
        names = [name for name in wanted if name != "values"]
        scores, hidden = self.scores.score(layout, temperature=temperature, want=names)
        fields = {name: layout.scatter(values) for name, values in scores.items()}
        if "values" in wanted and self.value_head is not None:
            if hidden is None:
                raise ConfigError(f"values need hidden states, which {type(self.scores.model).__name__} does not give")
            fields["values"] = layout.scatter(self.value_head(hidden))
        return ActionScores(mask=layout.mask(), **fields)

    def hidden_states(self, rows: Rows, *, at: str = "actions") -> Tensor:
        """Last hidden states: ``[B, A, H]`` of the positions that predict each action, or ``[B, H]`` of ``at="last"``."""
        if at not in ("actions", "last"):
            raise ValueError(f"at is {at!r}; allowed are 'actions' and 'last'")
        layout = self.token_layout(rows).to(self.device)
        hidden = self.scores.hidden(layout)
        return layout.scatter(hidden[layout.source]) if at == "actions" else hidden[layout.last]

    # -- sampling --------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts: text, message lists (through the chat template), or ids already."""
        return [
            [int(token) for token in prompt] if _is_ids(prompt) else self.encoder.prompt(prompt) for prompt in prompts
        ]

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Raise DataError for a prompt without tokens, or one that leaves no room in the model's window."""
        for row, ids in enumerate(self.encode_prompts(prompts)):
            if not ids or (self.window is not None and len(ids) >= self.window):
                raise DataError(f"data: the prompt of row {row} has {len(ids)} tokens; a completion needs at least one and "
                                f"room in the model's window of {self.window}. Shorten or drop the row")

    def sample(self, prompts: Sequence[Any], n: int, sampling: TextSampling, generator: torch.Generator) -> Rollout:
        """``n`` completions of every prompt, with the log-probs of the distribution they were drawn from.

        Samples have the form of their prompt: text for text (and for ids), one assistant message for messages. Raises
        DataError for a prompt that leaves no room in the model's window.
        """
        ids = self.encode_prompts(prompts)
        results = self.engine.generate(ids, n, sampling, generator)
        if len(results) != len(prompts) * n:
            raise RuntimeError(f"engine {self.engine.name} gave {len(results)} completions for {len(prompts)} x {n} requests")
        return self._rollout([prompt for prompt in prompts for _ in range(n)], results, n, sampling)

    def _rollout(self, prompts: list[Any], results: Sequence[RolloutResult], n: int, sampling: TextSampling) -> Rollout:
        counts = [len(result.completion_ids) for result in results]
        width = max(1, *counts, 1)
        old_logp = torch.zeros(len(results), width)
        for row, result in enumerate(results):
            old_logp[row, : counts[row]] = torch.tensor(result.logprobs)
        rows = Rows({
            "input_ids": [[*result.prompt_ids, *result.completion_ids] for result in results],
            "labels": [[IGNORED] * len(result.prompt_ids) + result.completion_ids for result in results],
        })
        texts = [decode_completion(result.completion_ids, self.tokenizer) for result in results]
        samples = [
            [{"role": "assistant", "content": text}] if _is_messages(prompt) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return Rollout(
            prompts=prompts, samples=samples, group=torch.arange(len(results)) // n, rows=rows,
            mask=torch.arange(width) < torch.tensor(counts)[:, None], old_logp=old_logp,
            finish_reason=[result.finish_reason for result in results], weight_version=self.weight_version,
            logprob_mode=results[0].logprob_mode if results else "processed",
            temperature=sampling.temperature or 1.0,
        )

    def unfold(self, rollout: Rollout, *, fraction: float, generator: torch.Generator) -> Rows:
        """One training row per completion.

        Columns: ``input_ids``, ``labels``, ``old_logp[N, A]``, ``action_mask[N, A]``, ``group[N]``, the rollout's own
        columns (``advantages`` among them) with numbers and tensors as one tensor, and ``ref_logp``, ``values`` when
        known. Raises ConfigError for a ``fraction`` below 1: every token of a completion comes out of one forward.
        """
        if fraction != 1:
            raise ConfigError(f"batch.action_fraction: {fraction} has no meaning for text, where one forward scores all "
                              "tokens of a row; leave it at 1")
        if "advantages" not in rollout.columns:
            raise DataError("the rollout has no advantages column yet")
        further = {"old_logp": rollout.old_logp, "action_mask": rollout.mask, "group": rollout.group}
        for name in ("ref_logp", "values"):
            if getattr(rollout, name) is not None:
                further[name] = getattr(rollout, name)
        columns = {name: _column(values) for name, values in rollout.columns.items()}
        return rollout.rows.with_columns(**{**columns, **further})

    # -- identity and saving ---------------------------------------------------------------------------------------

    def identity(self) -> str:
        """SHA-256 of the weights (:func:`mmalign.policies.modules.module_identity`)."""
        return module_identity(self.module)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model (or its adapter), the tokenizer and its chat template in Hugging Face format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        inner = unwrap(self.module)
        with _valid_generation_config(self.scores.model):
            inner.save_pretrained(folder)
            if is_peft_model(inner) and getattr(self.scores.model, "generation_config", None) is not None:
                self.scores.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@contextmanager
def _valid_generation_config(model: Any) -> Iterator[None]:
    """transformers refuses to save sampling settings without ``do_sample``; many published models have them."""
    config = getattr(model, "generation_config", None)
    before = getattr(config, "do_sample", None)
    if config is not None:
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
    try:
        yield
    finally:
        if config is not None:
            config.do_sample = before


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Tensor) or (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], int)
    )


def _is_messages(prompt: Any) -> bool:
    return not isinstance(prompt, (str, Tensor)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _column(values: list[Any]) -> Tensor | list[Any]:
    if values and all(isinstance(value, Tensor) for value in values):
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values
    if values and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return torch.tensor(values, dtype=torch.float32 if any(isinstance(v, float) for v in values) else torch.long)
    return values

