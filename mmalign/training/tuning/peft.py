"""Every tuning type of the ``peft`` package, by name, on transformers and diffusers models alike."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from typing import Any

import torch
from torch import nn

from mmalign.core.seeding import derive_seed
from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.policies.modules import adapter_parameter_names, is_adapted, unwrap
from mmalign.training.tuning.base import TUNINGS, FullTuning

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}), "rslora": ("LORA", {"use_rslora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}), "olora": ("LORA", {"init_lora_weights": "olora"}),
    "prompt": ("PROMPT_TUNING", {}), "prefix": ("PREFIX_TUNING", {}), "layer_norm": ("LN_TUNING", {}),
}
"""Field names for a peft type with some of its options set."""

PEFT_TYPES = (
    "lora", "ia3", "adalora", "loha", "lokr", "oft", "boft", "vera", "ln_tuning", "fourierft", "hra", "vblora",
    "prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "adaption_prompt", "poly", "xlora", "cpt",
    "bone", "miss", "randlora", "shira", "c3a", "trainable_tokens", "road", "waveft", "osf", "delora", "gralora",
)
"""Types that appear in the table; any further type of the installed peft is reached as ``{name: peft, type: ...}``."""

SPELLINGS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "num_tokens": "num_virtual_tokens"}
"""Accepted names for LoRA's r, lora_alpha, lora_dropout and prompt tuning's num_virtual_tokens."""

DIFFUSION_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
"""Attention projections of diffusers models, the usual LoRA targets there."""


class PeftTuning(FullTuning):
    """Inject an adapter of ``type`` with ``options`` (fields of peft's own config class, unknown ones refused)."""

    def __init__(self, *, type: str = "lora", **options: Any) -> None:
        super().__init__()
        self.type, self.options = type, options

    def config(self, policy: Policy) -> Any:
        """The peft config for this policy; raises ConfigError naming an unknown type or option."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType

        known = {str(getattr(kind, "value", kind)).upper(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type.upper() not in known:
            close = difflib.get_close_matches(self.type.upper(), known, n=1)
            raise ConfigError(f"tuning.type: the installed peft has no {self.type!r}"
                              f"{f'; did you mean {close[0].lower()!r}?' if close else '.'} Known: "
                              f"{', '.join(sorted(name.lower() for name in known))}")
        cls = known[self.type.upper()]
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        options: dict[str, Any] = {}
        for name, value in self.options.items():
            field = name if name in fields else SPELLINGS.get(name, name)
            if field not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                raise ConfigError(f"tuning.{name}: unknown option of {cls.__name__}"
                                  f"{f'; did you mean {close[0]!r}?' if close else ''}")
            options[field] = value
        if policy.modality == "diffusion":
            if "target_modules" in fields:
                options.setdefault("target_modules", list(DIFFUSION_TARGETS))
            if "init_lora_weights" in fields:
                options.setdefault("init_lora_weights", "gaussian")
        elif "task_type" in fields:
            # A reward model's new head must be trained and saved with the adapter, which peft does for SEQ_CLS.
            options.setdefault("task_type", TaskType(getattr(policy, "peft_task", "CAUSAL_LM")))
        if options.get("target_modules") == "all-linear" and policy.modality == "diffusion":
            options["target_modules"] = [n for n, m in policy.module.named_modules() if isinstance(m, nn.Linear)]
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tuning: {cls.__name__} refuses these options: {error}") from None

    def apply(self, policy: Policy, *, seed: int) -> None:
        """Freeze the base and inject the adapter; its initial values depend on ``seed`` only."""
        config = self.config(policy)
        for parameter in policy.module.parameters():
            parameter.requires_grad_(False)
        if is_adapted(policy.module):
            self._continue(policy, config)
            return
        # peft initialises from the global generator; fork it so that nothing else is disturbed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init", "adapter"))
            try:
                with warnings.catch_warnings():
                    # peft reads an attribute that transformers has renamed; nothing a user could do about it
                    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                    self._inject(policy, config)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"tuning.target_modules: {error}") from None
        for parameter in policy.module.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()  # master weights of what learns stay in float32

    def _continue(self, policy: Policy, config: Any) -> None:
        """Go on training the adapter that the model was loaded with; a second one on top of it could not be exported."""
        adapters = dict(unwrap(policy.module).peft_config)
        name, loaded = next(iter(adapters.items()))
        given = sorted({SPELLINGS.get(option, option) for option in self.options})
        different = [option for option in given if not _same(getattr(config, option, None), getattr(loaded, option, None))]
        if len(adapters) > 1 or loaded.peft_type != config.peft_type or different:
            what = f"tuning.name: {self.type}"
            if different and loaded.peft_type == config.peft_type:
                what = f"tuning.{different[0]}: {getattr(config, different[0])!r} against {getattr(loaded, different[0])!r}"
            raise ConfigError(f"{what}. The model is loaded with an adapter of its own ({loaded.peft_type.value.lower()}, "
                              f"{name!r}): use its options to go on training it, or merge it first "
                              "(mmalign export MODEL OUTPUT --kind merged)")
        trained = adapter_parameter_names(policy.module)
        for key, parameter in unwrap(policy.module).named_parameters():
            if key in trained:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()

    @staticmethod
    def _inject(policy: Policy, config: Any) -> None:
        from peft import get_peft_model, inject_adapter_in_model

        module: Any = policy.module
        if policy.modality != "diffusion":
            policy.replace_module(get_peft_model(module, config))
        elif hasattr(module, "add_adapter"):
            module.add_adapter(config)
        else:
            inject_adapter_in_model(config, module)


def _same(wanted: Any, found: Any) -> bool:
    """Whether an option of a new adapter is that of a stored one, whose target modules are spelled out."""
    if wanted == "all-linear":
        return isinstance(found, (str, list, set, tuple))
    if isinstance(wanted, (list, set, tuple)) and isinstance(found, (list, set, tuple)):
        return set(wanted) == set(found)
    return bool(wanted == found)


def _register() -> None:
    def builder(peft_type: str, fixed: dict[str, Any]) -> Any:
        def build(**options: Any) -> PeftTuning:
            return PeftTuning(type=peft_type, **{**fixed, **options})

        return build

    for name in PEFT_TYPES:
        TUNINGS.register(name)(builder(name, {}))
    for name, (peft_type, fixed) in VARIANTS.items():
        TUNINGS.register(name)(builder(peft_type, fixed))
    TUNINGS.register("peft")(PeftTuning)


_register()
