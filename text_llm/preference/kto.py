"""Preference optimisation from single samples labelled good or bad."""

from __future__ import annotations

from mmalign.data.chat import TextEncoding
from mmalign.methods.preference import UnpairedOptions, unpaired_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, LossOptions, TrainingParts


class KTOOptions(UnpairedOptions):
    """Options of preference optimisation on labelled text; pairs are taken apart."""

    encoding: TextEncoding = TextEncoding()
    """Tokenisation, masks and truncation."""


class BCOOptions(KTOOptions):
    """Options of BCO."""

    losses: list[LossOptions] = [LossOptions.model_validate({"name": "bco", "beta": 0.1})]
    """Point losses (bco, kto, apo_zero_unpaired) and supervised terms, each with its arguments and weight."""


@method("kto", options=KTOOptions, modality="text", paper="Ethayarajh et al., 2024, arXiv 2402.01306")
def kto(options: KTOOptions, context: BuildContext) -> TrainingParts:
    """Kahneman-Tversky optimisation on (prompt, completion, label) rows; any point loss by name."""
    return unpaired_parts(options, context, context.policy(options.model, encoding=options.encoding))


@method("bco", options=BCOOptions, modality="text", paper="Jung et al., 2024, arXiv 2404.04656")
def bco(options: BCOOptions, context: BuildContext) -> TrainingParts:
    """Binary classifier optimisation on (prompt, completion, label) rows, with the running reward shift."""
    return unpaired_parts(options, context, context.policy(options.model, encoding=options.encoding))
