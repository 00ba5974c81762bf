"""The decisions that a policy makes for the engine, and the properties of images that they depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Image(Protocol):
    """The properties of an unfinished image that policies depend on. Times are on the clock of a policy's `now`.

    Images are compared and hashed by identity.
    """

    @property
    def level(self) -> int:
        """Priority level, 1 is the most urgent."""

    @property
    def waited_s(self) -> float:
        """Seconds in the engine without a slot."""

    @property
    def arrived(self) -> float:
        """Time of arrival."""

    @property
    def deadline(self) -> float:
        """Time at which an unfinished image fails."""

    @property
    def has_own_deadline(self) -> bool:
        """True if the caller asked for a shorter time than the server's limit."""

    @property
    def has_started(self) -> bool:
        """True once the image has had a slot."""

    @property
    def has_slot(self) -> bool:
        """True while the image has a slot."""

    @property
    def tokens(self) -> int:
        """Image tokens of one batch row."""

    @property
    def batch_rows(self) -> int:
        """Batch rows of a forward."""

    @property
    def cost(self) -> int:
        """Image tokens of a forward, over all batch rows."""

    @property
    def steps_left(self) -> int:
        """Steps until the image is finished."""

    @property
    def ran_at(self) -> int:
        """Tick of the last step, or of the arrival."""


ImageT = TypeVar("ImageT", bound=Image)


@dataclass(frozen=True)
class Limits:
    """Limits that every policy keeps."""

    max_running: int
    """Number of slots."""
    max_tokens: int
    """Limit on the image tokens of all slots together. A single image may exceed it."""
    max_padding: float
    """Largest ratio of padding to an image's own tokens in a forward; 0 keeps sizes apart."""


class Costs(Protocol):
    """Estimates of the time that work takes on the device; 0 for work of which nothing is known."""

    @property
    def are_known(self) -> bool:
        """True once enough was measured for the estimates to be relied on."""

    def step_s(self, batch_rows: int, tokens: int) -> float:
        """Return the seconds of a forward of `batch_rows` rows with `tokens` image tokens each."""

    def has_measured(self, batch_rows: int, tokens: int) -> bool:
        """Return whether the estimate of `step_s` was measured; else it follows from other shapes."""

    def encode_s(self) -> float:
        """Return the seconds of an encoding of prompts."""

    def decode_s(self, tokens: int) -> float:
        """Return the seconds from an image's last step to its answer, for an image of `tokens` tokens."""


class Policy(Protocol):
    """The decisions about unfinished images: slots, forwards and refusals.

    A policy has no clock: every method gets the time. It keeps no images between two calls.
    """

    def assign(self, images: Collection[ImageT], now: float) -> tuple[list[ImageT], list[ImageT]]:
        """Return the images that have a slot from now on, and the others, each with the most urgent first.

        Args:
            images: All unfinished images.
            now: The time.
        """

    def choose(
        self, running: Sequence[ImageT], waiting: Sequence[ImageT], *, tick: int, now: float, max_tokens: int
    ) -> list[ImageT]:
        """Return the images of the next forward, at least one, in the order of `running`.

        Args:
            running: Images with a slot; not empty.
            waiting: The other images.
            tick: Counter of forwards.
            now: The time.
            max_tokens: Limit on the image tokens of the forward, including padding. A single image may exceed it.
        """

    def refused(self, images: Collection[ImageT], now: float) -> Mapping[ImageT, float]:
        """Return the images that cannot be finished by their deadline, with the seconds that each would take.

        Args:
            images: Images that have not had a slot.
            now: The time.
        """
