"""The frozen (or slowly moving) model that a policy is compared with.

A reference scores through the policy itself, with other weights in place, in evaluation mode and without gradients: so
it needs no second model object, sees the rows exactly as the policy does (shared ``draw`` included), and works for
every modality. What differs between kinds is one row of a table: which weights are put in place.

============== ====================================================================================================
``frozen_copy`` a copy of all weights, taken now
``adapter_off`` the base model with its adapters switched off: no copy at all; right when the adapters started as zero
``adapter_ref`` a copy of what is trained (an adapter that was already trained, say), taken now
``sync``        a copy that jumps ``alpha`` of the way to the policy every ``every`` updates (TR-DPO, Gorbatovski et
                al. 2024, arXiv 2404.09656)
``ema``         a moving average: ``decay`` of the old, the rest from the policy, every ``every`` updates
``bema``        a bias-corrected moving average (Block and Zhang 2025, arXiv 2508.00180)
``soup``        the weighted average of several checkpoints, frozen (SALSA, Chegini et al. 2024, arXiv 2411.01798)
``iterate``     the policy at the last outer boundary: a checkpoint of the last iteration, the policy as this stage
                starts, or a copy renewed every ``every`` updates
``precomputed`` scores stored before training, by the content of each row
``none``        no reference: every log-prob is 0
============== ====================================================================================================
"""

from __future__ import annotations

import logging

from torch import nn

from mmalign.errors import ConfigError
from mmalign.policies.base import Policy, Scorer
from mmalign.policies.modules import adapters_are_identity, is_adapted
from mmalign.policies.reference.averaged import SoupReference, average_checkpoints
from mmalign.policies.reference.base import (
    REFERENCES,
    HeldReference,
    Reference,
    ReferenceKind,
    ReferenceOptions,
    trained_outside_adapters,
)
from mmalign.policies.reference.frozen import AdapterOffReference, AdapterReference, FrozenCopyReference
from mmalign.policies.reference.moving import BemaReference, EmaReference, IterateReference, MovingReference, SyncReference
from mmalign.policies.reference.stored import PrecomputedReference

__all__ = [
    "REFERENCES", "AdapterOffReference", "AdapterReference", "BemaReference", "EmaReference", "FrozenCopyReference",
    "GivenReference", "HeldReference", "IterateReference", "MovingReference", "PrecomputedReference", "Reference",
    "ReferenceKind", "ReferenceOptions", "SoupReference", "SyncReference", "automatic_kind", "average_checkpoints",
    "make_reference",
]

logger = logging.getLogger(__name__)


class GivenReference(Reference):
    """Another scorer, loaded from another checkpoint."""

    kind = "given"


def make_reference(
    policy: Policy, options: ReferenceOptions | None = None, *, scorer: Scorer | None = None,
) -> Reference | None:
    """The reference of ``policy`` as it is now (after adapters were injected), or None for ``kind: none``.

    ``scorer`` is a policy loaded from another checkpoint to compare with instead. Raises ConfigError when it is, or
    shares trained weights with, the policy itself; or when the policy cannot have the kind that is asked for.
    """
    options = options or ReferenceOptions()
    if scorer is not None:
        _refuse_shared(policy, scorer)
        reference: Reference = GivenReference(scorer)
    elif options.kind == "none":
        return None
    else:
        kind = automatic_kind(policy.module) if options.kind == "auto" else options.kind
        reference = REFERENCES.get(kind)(policy, options)
    logger.info("reference: %s", reference.kind)
    return reference


def automatic_kind(module: nn.Module) -> str:
    """What ``auto`` stands for: the cheapest kind that equals the policy as it is now."""
    if not is_adapted(module):
        return "frozen_copy"
    if adapters_are_identity(module) and not trained_outside_adapters(module):
        return "adapter_off"
    return "adapter_ref"


def _refuse_shared(policy: Policy, scorer: Scorer) -> None:
    module = getattr(scorer, "module", None)
    shared: set[int] = set()
    if isinstance(module, nn.Module):
        trained = {parameter.data_ptr() for parameter in policy.module.parameters() if parameter.requires_grad}
        shared = trained & {parameter.data_ptr() for parameter in module.parameters()}
    if scorer is policy or shared:
        raise ConfigError("the reference is the policy itself (or shares its trained weights), so every log-ratio would be "
                          "0; load it separately, or let reference.kind make a copy")
