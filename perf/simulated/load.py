"""Load for simulated devices: requests with distinct pictures, and a count of the answers that are right."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from genserve import Client, GeneratedImage, GenServeError
from simulated.picture import shows

MAX_SEED = 2**63 - 1
SIZE = 64
"""Height and width of every request, in pixels."""

Request = dict[str, Any]
"""Arguments of `Client.generate`."""


def draw_requests(count: int, *, steps: Sequence[int], seed: int = 0) -> list[Request]:
    """Return requests with distinct prompts and seeds.

    Args:
        count: Number of requests.
        steps: Step counts, of which each request gets a random one.
        seed: Seed of the draw.
    """
    draw = random.Random(seed)
    return [
        {
            "prompt": f"picture {index} of {count}",
            "seed": draw.randint(0, MAX_SEED),
            "steps": draw.choice(steps),
            "height": SIZE,
            "width": SIZE,
        }
        for index in range(count)
    ]


def is_right(image: GeneratedImage, request: Request) -> bool:
    """Return whether an answer belongs to a request."""
    wanted = request["prompt"], request["seed"], request["steps"]
    return image.seed == request["seed"] and shows(image.image, *wanted)


@dataclass
class Answers:
    """Count of the answers to a load.

    Attributes:
        requests: Number of requests.
        by_server: Right answers, by the server's name.
        wrong: Answers that belong to another request.
        repeated: Answers to requests that had one already.
        errors: Errors, by class and message.
        longest_s: Longest time from the moment a request is taken to its answer, in seconds.
        seconds: Length of the run.
    """

    requests: int
    by_server: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    repeated: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    seconds: float = 0.0
    _answered: set[int] = field(default_factory=set)

    @property
    def missing(self) -> int:
        """Requests without an answer."""
        return self.requests - len(self._answered)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    def note(
        self, index: int, request: Request, outcome: GeneratedImage | GenServeError | None, waited_s: float
    ) -> None:
        """Count the answer to the request with this index: an image or an error."""
        self.longest_s = max(self.longest_s, waited_s)
        if index in self._answered:
            self.repeated += 1
        self._answered.add(index)
        if not isinstance(outcome, GeneratedImage):
            self.errors[f"{type(outcome).__name__}: {outcome}"] += 1
        elif is_right(outcome, request):
            self.by_server[outcome.info["model"]] += 1
        else:
            self.wrong += 1

    def faults(self) -> list[str]:
        """Return descriptions of everything except one right answer per request."""
        found = {"without an answer": self.missing, "with two answers": self.repeated, "with a wrong image": self.wrong}
        lines = [f"{count} requests {name}" for name, count in found.items() if count]
        return lines + [f"{count} requests failed: {error}" for error, count in self.errors.items()]


def map_all(
    client: Client, requests: Sequence[Request], *, on_answer: Callable[[int], object] = lambda _: None, **options: Any
) -> Answers:
    """Send all requests with `Client.map_generate`, and return the count of answers.

    Args:
        client: Client of one or several servers.
        requests: The load.
        on_answer: Called after each answer with their number so far.
        options: Further arguments of `map_generate`.
    """
    answers, taken_at = Answers(len(requests)), [0.0] * len(requests)

    def items() -> Iterator[Request]:
        for index, request in enumerate(requests):
            taken_at[index] = time.monotonic()
            yield request

    started = time.monotonic()
    for number, result in enumerate(client.map_generate(items(), ordered=False, **options), start=1):
        waited_s = time.monotonic() - taken_at[result.index]
        answers.note(result.index, requests[result.index], result.error or result.result, waited_s)
        on_answer(number)
    answers.seconds = time.monotonic() - started
    return answers


def loop_over(clients: Sequence[Client], requests: Sequence[Request]) -> Answers:
    """Send the requests one after the other, each to the next client, and return the count of answers."""
    answers = Answers(len(requests))
    started = time.monotonic()
    for index, request in enumerate(requests):
        asked = time.monotonic()
        image = clients[index % len(clients)].generate(**request)
        answers.note(index, request, image, time.monotonic() - asked)
    answers.seconds = time.monotonic() - started
    return answers
