"""Reward models: language models with one output per row, scored, trained and saved like any other policy.

The network is transformers' ``AutoModelForSequenceClassification`` with one label, and its own forward gives the score
(at the last token that is not padding), so the folder that training writes gives the same numbers without mmalign.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmalign.core.logprobs import ActionScores
from mmalign.core.seeding import generator
from mmalign.data.chat import TextEncoder, TextEncoding
from mmalign.data.progress import without_transformers_bars
from mmalign.data.rows import Rows
from mmalign.errors import CheckpointError, ConfigError, DataError, MmalignError
from mmalign.policies.base import Draw
from mmalign.policies.loading import ModelOptions, base_of_adapter, resolve_model_path
from mmalign.policies.modules import evaluating, is_adapted, is_peft_model, module_identity, unwrap
from mmalign.policies.pretrained import DTYPES, default_device
from mmalign.policies.token_rows import TokenRows
from mmalign.policies.token_scores import language_model

logger = logging.getLogger(__name__)


class RewardPolicy(TokenRows):
    """A sequence classifier with one label behind the scorer's contract: a row has one action, whose value is its score.

    Rows hold ``input_ids`` (ragged lists; ``labels`` are not read). ``log_probs`` gives ``logp[B, 1]`` = the reward, so
    that the pair losses on scores (``bt_reward``) apply through the same objective as every other loss.

    Args:
        module: the classifier, plain or inside a ``PeftModel``.
        tokenizer: its tokenizer; without a padding token the end token takes its place, in model and tokenizer.
        encoding: how rows of text become ids.
        rows_per_forward: most rows of one forward without gradient; null sets no limit.
    """

    modality = "text"
    peft_task = "SEQ_CLS"
    """Task of adapters on it: the head is trained and saved beside them."""
    score_columns = ("input_ids",)

    def __init__(
        self, module: nn.Module, tokenizer: Any, *, encoding: TextEncoding | None = None, rows_per_forward: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding or TextEncoding()
        self.rows_per_forward = rows_per_forward
        self.weight_version = 0
        self._encoder: TextEncoder | None = None
        self.replace_module(module)
        self._settle_padding()

    @classmethod
    def from_options(
        cls, options: ModelOptions, *, encoding: TextEncoding | None = None, seed: int = 0, head: str = "new",
        rows_per_forward: int | None = None,
    ) -> RewardPolicy:
        """Load a language model (with a new head), a sequence classifier, or an adapter on either; see :func:`load_reward_lm`."""
        module, tokenizer = load_reward_lm(options, seed=seed, head=head)
        return cls(module, tokenizer, encoding=encoding, rows_per_forward=rows_per_forward)

    def _settle_padding(self) -> None:
        """One padding token for tokenizer and model: it decides where the score is read."""
        tokenizer, config = self.tokenizer, self.model.config.get_text_config()
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise ConfigError("model.path: the tokenizer has neither a padding nor an end token; a reward model reads its "
                                  "score at the last token that is not padding. Set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = int(tokenizer.pad_token_id)
        for part in (self.model.config, config):
            part.pad_token_id = self.pad_id
        if self.pad_id == tokenizer.eos_token_id:
            logger.warning("the padding token %r is the end token, so scores are read at the token before the final end token, "
                           "in training and wherever transformers loads this model", tokenizer.pad_token)

    # -- the module --------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The network that is trained, as it is wrapped now."""
        return self._module

    @property
    def model(self) -> Any:
        """The transformers model inside wrappers and adapters."""
        return language_model(self._module)

    def replace_module(self, module: nn.Module) -> None:
        """Score and save with ``module`` from now on."""
        self._module = module
        self._forward_names = frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._module.parameters()).device

    @property
    def window(self) -> int | None:
        """Most tokens of a row; None when the model names no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def encoder(self) -> TextEncoder:
        """Turns rows of text into ids with this policy's tokenizer."""
        if self._encoder is None:
            self._encoder = TextEncoder(self.tokenizer, self.encoding)
        return self._encoder

    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass (or stop doing so)."""
        if not enable:
            self.model.gradient_checkpointing_disable()
            return
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if is_adapted(self._module):
            self.model.enable_input_require_grads()

    # -- data --------------------------------------------------------------------------------------------------------

    def encode_sample(self, prompt: Any, completion: Any) -> list[int]:
        """Ids of a prompt with its completion as in training, cut at the window."""
        samples = self.encoder.samples({"prompt": prompt, "completion": completion})
        if not isinstance(samples, dict):
            raise DataError(f"the row cannot be encoded: {samples.reason}")
        limits = [limit for limit in (self.encoder.max_length, self.window) if limit]
        return samples[""].ids[: min(limits) if limits else None]

    # -- scoring -----------------------------------------------------------------------------------------------------

    def action_mask(self, rows: Rows) -> Tensor:
        """``[B, 1]``, all True: a row has one score."""
        return torch.ones(len(rows), 1, dtype=torch.bool)

    def log_probs(
        self, rows: Rows, *, draw: Draw | None = None, temperature: float = 1.0, want: Iterable[str] = (),
    ) -> ActionScores:
        """``logp[B, 1]`` float32: the reward of every row. Without gradients the module is in evaluation mode.

        Raises ConfigError for further fields, of which scores have none, and DataError for rows beyond the window.
        """
        if tuple(want):
            raise ConfigError(f"a reward model gives one score per row and no {', '.join(want)}; use losses on scores "
                              "(bt_reward)")
        if torch.is_grad_enabled():
            values = self._scores(rows["input_ids"])
        else:
            with evaluating(self._module):
                step = self.rows_per_forward or max(1, len(rows))
                values = torch.cat([self._scores(rows["input_ids"][i : i + step]) for i in range(0, max(1, len(rows)), step)])
        return ActionScores(logp=values[:, None] / temperature, mask=self.action_mask(rows).to(self.device))

    def _scores(self, batch: Sequence[Sequence[int]]) -> Tensor:
        if not batch:
            return torch.zeros(0, device=self.device)
        width = max(len(ids) for ids in batch)
        if self.window is not None and width > self.window:
            raise DataError(f"a row has {width} tokens, more than the model's window of {self.window}; lower encoding.max_length")
        ids = torch.full((len(batch), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = 1
        further = {"use_cache": False} if "use_cache" in self._forward_names else {}
        output = self._module(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **further)
        logits: Tensor = output.logits
        return logits.squeeze(-1).float()

    # -- what it cannot do -------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Any], n: int, sampling: Any, generator: torch.Generator) -> NoReturn:
        """Refused: a reward model writes nothing."""
        raise ConfigError("a reward model cannot generate; remove the evaluation section, or give a language model")

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Refused, as :meth:`sample` is."""
        self.sample(prompts, 1, None, torch.Generator())

    def unfold(self, rollout: Any, *, fraction: float, generator: torch.Generator) -> NoReturn:
        """Refused, as :meth:`sample` is."""
        raise ConfigError("a reward model cannot be trained on rollouts")

    # -- identity and saving -----------------------------------------------------------------------------------------

    def identity(self) -> str:
        """SHA-256 of the weights."""
        return module_identity(self._module)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder for ``AutoModelForSequenceClassification`` (or the adapter with the head), with the tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with without_transformers_bars():
            unwrap(self._module).save_pretrained(folder)
        if is_peft_model(self._module):
            # peft writes no model configuration; the number of labels and the padding token are part of the score.
            self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_reward_lm(options: ModelOptions, *, seed: int = 0, head: str = "new") -> tuple[Any, Any]:
    """``(module, tokenizer)`` of a reward model.

    A folder of a language model gets a new score head with weights of standard deviation ``1 / sqrt(H + 1)`` drawn from
    ``seed`` (Stiennon et al. 2020, arXiv 2009.01325); a sequence classifier keeps its own. ``head="stored"`` refuses the
    former. A PEFT adapter folder is put on its base, and ``options.adapter`` on top of ``options.path``.

    Raises:
        CheckpointError: a folder that cannot be read, lacks other weights than the head, or has more than one label.
        ConfigError: ``head="stored"`` without a stored head, or an unknown precision.
    """
    if options.dtype not in DTYPES:
        raise ConfigError(f"model.dtype: {options.dtype!r} is not a precision; allowed: {', '.join(DTYPES)}")
    path = resolve_model_path(options.path)
    adapter = resolve_model_path(options.adapter, key="model.adapter") if options.adapter else None
    if adapter is None and (Path(path) / "adapter_config.json").is_file():
        path, adapter = resolve_model_path(base_of_adapter(Path(path))), path
    model, fresh = _classifier(path, options)
    if fresh and adapter is None:
        if head == "stored":
            raise ConfigError(f"path: {path} is a language model without a score head; train one with method reward_model, or "
                              "name a folder of AutoModelForSequenceClassification")
        width = model.score.weight.shape[1]
        noise = torch.randn(1, width, generator=generator(seed, "init", "reward_head"))
        with torch.no_grad():
            model.score.weight.copy_(noise * (width + 1) ** -0.5)
    if adapter is not None:
        model = _with_adapter(model, adapter, fresh)
    tokenizer = _tokenizer(path, adapter, options)
    model.to(default_device() if options.device is None else torch.device(options.device))
    model.train()
    if options.gradient_checkpointing:
        language_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def _classifier(path: str, options: ModelOptions) -> tuple[Any, bool]:
    """The classifier, and whether its head is new."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    further: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None:
        further["revision"] = options.revision
    try:
        config = AutoConfig.from_pretrained(path, **further)
        stored = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or [])
        if stored and config.num_labels != 1:
            raise CheckpointError(f"model.path: {path} is a classifier with {config.num_labels} labels; a reward model has one")
        config.num_labels = 1
        with torch.random.fork_rng(devices=[]), _quiet():  # transformers draws a new head from the global generator
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=DTYPES[options.dtype], attn_implementation=options.attention,
                output_loading_info=True, **further)
    except MmalignError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.path: cannot load {path} as a reward model ({reason})") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
    if missing:
        raise CheckpointError(f"model.path: {path} lacks {len(missing)} weights ({', '.join(missing[:4])}); the folder is "
                              "incomplete, or its kind of model has no score head named score")
    return model, any(name.startswith("score.") for name in info["missing_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, and without the report that the head is new, which is what was asked for."""
    reports = logging.getLogger("transformers")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        with without_transformers_bars():
            yield
    finally:
        reports.setLevel(level)


def _with_adapter(model: Any, adapter: str, fresh: bool) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    file = Path(adapter) / "adapter_model.safetensors"
    try:
        if fresh:
            with safe_open(file, framework="pt") as reader:
                if not any(".score." in name for name in reader.keys()):  # noqa: SIM118 - a reader is not a mapping
                    raise ConfigError(f"model.adapter: {adapter} holds no score head and its base has none; it is an adapter of "
                                      "a language model")
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except MmalignError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.adapter: cannot load {adapter} ({reason})") from error


def _tokenizer(path: str, adapter: str | None, options: ModelOptions) -> Any:
    from transformers import AutoTokenizer

    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    try:
        return AutoTokenizer.from_pretrained(adapter if own else path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"model.path: {path} has no tokenizer ({error})") from error
