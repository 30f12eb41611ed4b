"""Direct preference optimisation and every other row of the pair-loss table."""

from __future__ import annotations

from mmalign.data.chat import TextEncoding
from mmalign.methods.preference import PreferenceOptions, preference_parts
from mmalign.methods.registry import method
from mmalign.methods.training import BuildContext, TrainingParts


class DPOOptions(PreferenceOptions):
    """Options of preference optimisation on text pairs."""

    encoding: TextEncoding = TextEncoding()
    """Tokenisation, masks and truncation."""


@method("dpo", options=DPOOptions, modality="text", paper="Rafailov et al., 2023, arXiv 2305.18290")
def dpo(options: DPOOptions, context: BuildContext) -> TrainingParts:
    """Preference optimisation on (prompt, chosen, rejected) rows with any pair loss."""
    return preference_parts(options, context, context.policy(options.model, encoding=options.encoding))
