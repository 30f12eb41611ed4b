"""References that never change: the base under an adapter, and copies of the policy as it was."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from mmalign.errors import ConfigError
from mmalign.policies.base import Policy
from mmalign.policies.modules import adapters_are_identity, adapters_disabled, is_adapted
from mmalign.policies.reference.base import (
    REFERENCES,
    HeldReference,
    Reference,
    ReferenceOptions,
    changing_names,
    tensors_of,
    trained_outside_adapters,
)

logger = logging.getLogger(__name__)


@REFERENCES.register("adapter_off")
class AdapterOffReference(Reference):
    """The base model under the adapters."""

    kind = "adapter_off"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy)
        module = policy.module
        if not is_adapted(module):
            raise ConfigError("reference.kind: adapter_off needs a policy with an adapter; set tuning.name to lora (or "
                              "another adapter), or use frozen_copy")
        outside = trained_outside_adapters(module)
        if outside:
            raise ConfigError(f"reference.kind: adapter_off does not undo trained parameters outside the adapter "
                              f"({', '.join(sorted(outside)[:3])}); use frozen_copy or adapter_ref")
        if not adapters_are_identity(module):
            logger.warning("reference.kind adapter_off compares with the base model, but the adapter is not at zero: the "
                           "policy starts away from its reference. adapter_ref keeps the adapter as it is now")

    def weights(self) -> AbstractContextManager[None]:
        """Adapters disabled."""
        return adapters_disabled(self.policy.module)


@REFERENCES.register("frozen_copy")
class FrozenCopyReference(HeldReference):
    """Every weight as it is now."""

    kind = "frozen_copy"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        super().__init__(policy, tensors_of(policy.module))


@REFERENCES.register("adapter_ref")
class AdapterReference(HeldReference):
    """What is trained (adapters, and anything beside them) as it is now; the frozen base is shared."""

    kind = "adapter_ref"

    def __init__(self, policy: Policy, options: ReferenceOptions) -> None:
        if not is_adapted(policy.module):
            raise ConfigError("reference.kind: adapter_ref needs a policy with an adapter; use frozen_copy")
        super().__init__(policy, changing_names(policy.module))
