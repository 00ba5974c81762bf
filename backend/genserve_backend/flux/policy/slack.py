"""The policy `slack`: deadlines that callers asked for are met where the device can meet them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Generic

from genserve_backend.flux.policy.base import Costs, Image, ImageT, Limits
from genserve_backend.flux.policy.batches import by_turn, fill, in_order, turn
from genserve_backend.flux.policy.plan import Plan, time_alone_s
from genserve_backend.flux.policy.slots import assign_slots, by_age, is_less_urgent
from genserve_backend.worker.scheduling import AGING_S

PATIENCE = 16
"""Turns, weighted by level, after which an image without a deadline of its own leads a forward, however tight the
deadlines are, once it is `AGING_S` old. At the default level, such images then lead one forward in eight together."""
GAIN = 0.95
"""Largest share of its time alone that an image may add to the forward of another one. Above it, they gain nothing by
sharing: one after the other, the first is done sooner and the second no later."""
SURE = 0.8
"""Share of the estimated time that has to be too long for an image to be refused."""


class Slack:
    """Urgency, except where a deadline is in danger.

    Of the images with deadlines of their own, those that can meet them are planned, the earliest deadline first. While
    there is time to spare, all images take turns. Once there is none, the planned images come first, and others join
    them only as far as they cost no deadline. An image that cannot meet its own deadline runs when nothing else does.
    Images without a deadline of their own keep the order of `urgency` among themselves, and a share of the forwards.

    Args:
        limits: Slots, tokens and padding.
        costs: Estimates of the time of work.
    """

    def __init__(self, limits: Limits, costs: Costs) -> None:
        self._limits = limits
        self._costs = costs

    def assign(self, images: Collection[ImageT], now: float) -> tuple[list[ImageT], list[ImageT]]:
        """Return the images with a slot and the others, each with the most urgent first."""
        plan = Plan(images, self._costs, now, max_tokens=self._limits.max_tokens)
        late = set(plan.late)
        leads = plan.is_tight or all(image.has_own_deadline for image in images)
        first = plan.queue if leads else []
        others = [image for image in images if image not in late and not (leads and image in plan.order)]

        def preemptable(running: ImageT, newcomer: ImageT) -> bool:
            if running in late or newcomer in late:
                return newcomer not in late
            if plan.is_tight and newcomer in plan.order:
                if running in plan.order:
                    return plan.order[newcomer] < plan.order[running]
                return newcomer.level <= _rank(running)
            return is_less_urgent(running, newcomer)

        return assign_slots(
            [*_merge(first, sorted(others, key=by_age)), *plan.late],
            max_running=self._limits.max_running,
            max_tokens=self._limits.max_tokens,
            preemptable=preemptable,
        )

    def choose(
        self, running: Sequence[ImageT], waiting: Sequence[ImageT], *, tick: int, now: float, max_tokens: int
    ) -> list[ImageT]:
        """Return the image that leads, and those that gain by sharing its forward and cost no deadline."""
        plan = Plan([*running, *waiting], self._costs, now, max_tokens=max_tokens)
        here = set(running)
        planned = [image for image in plan.queue if image in here]
        others = by_turn([image for image in running if not image.has_own_deadline], tick)
        order = [*planned, *others] or [image for image in plan.late if image in here]
        lead = self._lead(planned, others, plan, tick, now) if planned and others else order[0]
        forward = Forward(lead, plan, self._costs)
        chosen = fill(
            [lead, *(image for image in order if image is not lead)],
            max_tokens=max_tokens,
            max_padding=self._limits.max_padding,
            may_join=forward.may_join,
        )
        return in_order(running, chosen)

    def refused(self, images: Collection[ImageT], now: float) -> Mapping[ImageT, float]:
        """Return the images that could not be finished by their own deadline on an idle device."""
        if not self._costs.are_known:
            return {}
        # By measured times only: a size that was refused by a wrong estimate would never be measured.
        times = {
            image: time_alone_s(image, self._costs)
            for image in images
            if image.has_own_deadline and self._costs.has_measured(image.batch_rows, image.tokens)
        }
        return {image: seconds for image, seconds in times.items() if SURE * seconds > image.deadline - now}

    def _lead(
        self, planned: Sequence[ImageT], others: Sequence[ImageT], plan: Plan[ImageT], tick: int, now: float
    ) -> ImageT:
        """Return the image that the forward is for: the first planned one, or the other one whose turn it is."""
        head, other = planned[0], others[0]
        patience = PATIENCE * len({image.tokens for image in others})
        if due := [image for image in others if turn(image, tick) >= patience and now - image.arrived >= AGING_S]:
            return due[0]
        may_lead = other.level < head.level or self._costs.step_s(other.batch_rows, other.tokens) <= plan.free_s
        return other if may_lead and turn(other, tick) > turn(head, tick) else head


class Forward(Generic[ImageT]):
    """A forward that images join as long as it costs no planned image its deadline.

    Args:
        lead: The image that the forward is for.
        plan: The deadlines.
        costs: Estimates of the time of the forward.
    """

    def __init__(self, lead: ImageT, plan: Plan[ImageT], costs: Costs) -> None:
        self._lead = lead
        self._plan = plan
        self._costs = costs
        self._seconds = costs.step_s(lead.batch_rows, lead.tokens)
        # Work on an image is no delay for itself, nor for those that come after it in the plan.
        self._done_before = [0.0] * len(plan.entries)
        self._done_on = [0.0] * len(plan.entries)
        self._add(lead)

    def may_join(self, image: ImageT, batch_rows: int, tokens: int) -> bool:
        """Return whether an image joins, and count it in if so.

        Args:
            image: The next image.
            batch_rows: Rows of the forward with the image.
            tokens: Image tokens of a row with the image.
        """
        seconds = max(self._seconds, self._costs.step_s(batch_rows, tokens))
        together = self._lead.has_own_deadline and image.has_own_deadline
        if together and self._costs.has_measured(batch_rows, tokens):
            alone = self._costs.step_s(image.batch_rows, image.tokens)
            if seconds - self._seconds > GAIN * alone:
                return False
        if self._costs_a_deadline(image, seconds):
            return False
        self._seconds = seconds
        self._add(image)
        return True

    def _costs_a_deadline(self, image: ImageT, seconds: float) -> bool:
        """Return whether a forward that takes `seconds` with an image uses up time that a planned one does not have."""
        plan, now_s = self._plan, self._seconds
        position = plan.order.get(image, len(plan.entries))
        share_s = plan.entries[position].share_s if image in plan.order else 0.0
        for number, entry in enumerate(plan.entries):
            before = self._done_before[number]
            new_before = before + share_s if number >= position else before
            if seconds - new_before > max(now_s - before, entry.spare_s):
                return True
            on = self._done_on[number]
            new_on = entry.step_s if number == position else on
            if seconds - new_on > max(now_s - on, entry.slack_s):
                return True
        return False

    def _add(self, image: ImageT) -> None:
        position = self._plan.order.get(image)
        if position is not None:
            entry = self._plan.entries[position]
            self._done_on[position] = entry.step_s
            for number in range(position, len(self._done_before)):
                self._done_before[number] += entry.share_s


def _rank(image: Image) -> int:
    """Return the level of an image, and with no deadline of its own, one less for every `AGING_S` of waiting.

    Unlike the level after aging it has no lower limit, so that deadlines of level 1 cannot starve the other images.
    """
    return image.level if image.has_own_deadline else image.level - int(image.waited_s / AGING_S)


def _merge(planned: Sequence[ImageT], others: Sequence[ImageT]) -> list[ImageT]:
    """Return all images. A planned one comes before the others of its rank; both keep their order."""
    merged: list[ImageT] = []
    left = list(others)
    for image in planned:
        while left and _rank(left[0]) < image.level:
            merged.append(left.pop(0))
        merged.append(image)
    return [*merged, *left]
