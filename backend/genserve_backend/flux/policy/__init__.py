"""Policies: which images run, which wait, which share a forward, and which are refused. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from genserve_backend.flux.policy.base import Costs, Limits, Policy
from genserve_backend.flux.policy.ordered import Ordered, first_come, least_work
from genserve_backend.flux.policy.slack import Slack
from genserve_backend.flux.policy.urgency import Urgency
from genserve_backend.settings import FluxSettings, PolicyName

POLICIES: dict[PolicyName, Callable[[Limits, Costs], Policy]] = {
    "urgency": lambda limits, costs: Urgency(limits),
    "slack": Slack,
    "fifo": lambda limits, costs: Ordered(limits, first_come),
    "shortest": lambda limits, costs: Ordered(limits, least_work),
}


def make_policy(settings: FluxSettings, device_type: str, costs: Costs) -> Policy:
    """Return the policy that the settings name, with their limits for a device type in torch's notation."""
    limits = Limits(
        max_running=settings.max_running,
        max_tokens=settings.max_batched_tokens,
        max_padding=settings.padding_limit(device_type),
    )
    return POLICIES[settings.policy](limits, costs)
