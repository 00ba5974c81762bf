"""Changes worth trying, by model: from some values, the most promising first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any

from genserve.serve.finding import in_units
from genserve.serve.options import ServeError
from genserve.serve.repository import INSTANCE_ENV, instance_count
from genserve.tune.search import Change, Values
from genserve_backend.flux.dtypes import unsupported
from genserve_backend.settings import FluxDType, FluxSettings, ModelSettings, RerankSettings

THREADS_ENV = {"flux": "FLUX_THREADS", "rerank": "RERANK_THREADS"}
LOSSLESS = {
    "flux": ("FLUX_WORKERS", "FLUX_THREADS", "FLUX_MAX_BATCHED_TOKENS", "FLUX_MAX_RUNNING", "FLUX_COMPILE"),
    "rerank": ("WORKERS", "RERANK_THREADS", "MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS", "RERANK_COMPILE"),
}
"""Variables that are tuned. They change results in the last bits at most."""
LOSSY = {"flux": ("FLUX_DTYPE", "FLUX_MAX_PADDING"), "rerank": ("RERANK_DTYPE",)}
"""Variables that change images or scores a little. int8wo and FLUX_OFFLOAD save memory, not time; FLUX_CACHE gives the
requests' thresholds another meaning: they are not tuned."""
FACTORS = (2.0, 0.5, 4.0)
"""Steps from a limit, or a number of instances, to the next ones to try."""
PADDING = ("0", "0.25", "1")
MEMORY_SHARE = 0.9
"""Share of a device's memory that the instances may take."""


@dataclass(frozen=True)
class Machine:
    """Devices of a model's instances, as its first server reports them.

    Attributes:
        device: The first device in torch's notation.
        cores: CPU cores.
        default_threads: CPU threads per worker if nothing sets them.
        instance_bytes: Memory that an instance takes.
        total_bytes: Memory of a device.
        capability: A GPU's compute capability.
        has_int8: True for a CPU that has VNNI.
        has_compiler: True if there is a compiler for compiled code.
    """

    device: str
    cores: int
    default_threads: int
    instance_bytes: int | None = None
    total_bytes: int | None = None
    capability: tuple[int, int] | None = None
    has_int8: bool = False
    has_compiler: bool = True

    @property
    def on_gpu(self) -> bool:
        """True for a GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Demand:
    """Work of the load that can be at a server at a time. Higher limits would change nothing.

    Attributes:
        requests: Requests in flight; None if they come at a rate.
        items: Images, or pairs of query and document, of these requests.
        tokens: Their tokens.
        sizes: Number of image sizes.
    """

    requests: int | None
    items: int | None
    tokens: int | None
    sizes: int = 1


class Space:
    """Changes of one model's settings.

    Args:
        model: ``flux`` or ``rerank``.
        settings: Parses the settings with some values. Raises ServeError if they do not go together.
        machine: The devices.
        demand: The load.
        before: The values in force at the start: the default of each is tried first.
        lossy: Try settings that change images or scores a little.
    """

    def __init__(
        self,
        model: str,
        settings: Callable[[Values], ModelSettings],
        machine: Machine,
        demand: Demand,
        *,
        before: Values,
        lossy: bool,
    ) -> None:
        self._model = model
        self._settings = settings
        self._machine = machine
        self._demand = demand
        self._before = before
        self._lossy = lossy

    def changes(self, values: Values) -> list[Change]:
        """Return the changes to try from these values, the most promising first."""
        found = [Change({name: None}) for name, value in self._before.items() if values.get(name) == value]
        settings = self._settings(values)
        if isinstance(settings, FluxSettings):
            found += self._flux(settings, values)
        elif isinstance(settings, RerankSettings):
            found += self._rerank(settings, values)
        return [change for change in found if change.refused or self._is_valid(change.apply(values))]

    def _is_valid(self, values: Values) -> bool:
        try:
            self._settings(values)
        except ServeError:
            return False
        return True

    def _flux(self, settings: FluxSettings, values: Values) -> Iterator[Change]:
        if self._lossy:
            others: tuple[FluxDType, ...] = ("fp8",) if self._machine.on_gpu else ("int8", "bfloat16")
            for dtype in others:
                if dtype != settings.dtype:
                    yield Change({"FLUX_DTYPE": dtype}, self._refusal(dtype))
        yield from self._instances(values, settings.threads)
        yield from self._limit("FLUX_MAX_BATCHED_TOKENS", attrgetter("max_batched_tokens"), self._demand.tokens, values)
        yield from self._limit("FLUX_MAX_RUNNING", attrgetter("max_running"), self._demand.items, values)
        if not settings.compiled:
            yield self._compiled("FLUX_COMPILE")
        if self._lossy and self._demand.sizes > 1:
            padding = settings.padding_limit("cuda" if self._machine.on_gpu else "cpu")
            yield from (Change({"FLUX_MAX_PADDING": each}) for each in PADDING if float(each) != padding)

    def _rerank(self, settings: RerankSettings, values: Values) -> Iterator[Change]:
        device, on_torch = self._machine.device, settings.engine == "torch"
        budget = methodcaller("token_budget", device)
        if self._lossy and on_torch and not self._machine.on_gpu:
            for dtype in ("int8", "bfloat16"):
                if dtype != settings.dtype:
                    yield Change({"RERANK_DTYPE": dtype}, self._refusal(dtype))
        if on_torch:
            yield from self._instances(values, settings.threads)
        yield from self._limit("MAX_NUM_BATCHED_TOKENS", budget, self._demand.tokens, values)
        yield from self._limit("MAX_NUM_SEQS", attrgetter("max_num_seqs"), self._demand.items, values)
        if on_torch:
            if settings.compiles(device):
                yield Change({"RERANK_COMPILE": "false"})
            else:
                yield self._compiled("RERANK_COMPILE")

    def _instances(self, values: Values, threads: int) -> Iterator[Change]:
        """Yield numbers of instances; on a CPU, each with the threads with which all cores have work."""
        name, machine = INSTANCE_ENV[self._model], self._machine
        now = instance_count(self._model, values)
        most = self._demand.requests or machine.cores
        for count in (now, *(int(now * factor) for factor in FACTORS)):
            if not 1 <= count <= (most if machine.on_gpu else min(most, machine.cores)):
                continue
            change: dict[str, str | None] = {name: None if count == 1 else str(count)}
            each = machine.cores // count
            if not machine.on_gpu:
                change[THREADS_ENV[self._model]] = None if each == machine.default_threads else str(each)
            if count != now or not (machine.on_gpu or each == (threads or machine.default_threads)):
                yield Change(change, self._too_large(count))

    def _too_large(self, count: int) -> str | None:
        each, total = self._machine.instance_bytes, self._machine.total_bytes
        if count == 1 or each is None or total is None or count * each <= MEMORY_SHARE * total:
            return None
        return f"{count} instances need about {in_units(count * each)}, and the device has {in_units(total)}"

    def _limit(self, name: str, of: Callable[[Any], int], most: int | None, values: Values) -> Iterator[Change]:
        """Yield neighbours of a limit. Between two limits that the load does not reach, there is no difference.

        Args:
            name: Its variable.
            of: Returns it from settings.
            most: The most that the load can use; None if that is unknown.
            values: The values to change.
        """
        now = of(self._settings(values))
        default = of(self._settings({key: value for key, value in values.items() if key != name}))
        for factor in FACTORS:
            value = int(now * factor)
            if value >= 1 and (most is None or min(value, most) != min(now, most)):
                yield Change({name: None if value == default else str(value)})

    def _compiled(self, name: str) -> Change:
        return Change({name: "true"}, None if self._machine.has_compiler else "there is no C or C++ compiler")

    def _refusal(self, dtype: Any) -> str | None:
        """Return the reason why the device cannot run a dtype, None if it can."""
        machine = self._machine
        if self._model == "flux":
            return unsupported(dtype, machine.device, capability=machine.capability, has_int8=machine.has_int8)
        return "int8 needs a CPU that has VNNI" if dtype == "int8" and not machine.has_int8 else None


def tuned(model: str, *, lossy: bool) -> tuple[str, ...]:
    """Return the variables that are tuned for a model."""
    return LOSSLESS[model] + (LOSSY[model] if lossy else ())


def set_values(model: str, environment: Mapping[str, str], *, lossy: bool) -> dict[str, str]:
    """Return the tuned variables that are set in an environment."""
    return {name: environment[name] for name in tuned(model, lossy=lossy) if environment.get(name)}
