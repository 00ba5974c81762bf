"""Features that ``pytest --features NAME,...`` turns on for the tests that it runs, and the tests that they exclude.

The environment goes to servers, studies and engines. Half of the requests get a feature's arguments, by their seed, so
batches are mixed and a request that is sent again is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genserve_backend.settings import Env, FluxSettings

TAKE_TURNS = "images take turns"
PADDED = "int8 images are not the same padded, so they are not by default"
HAS_CACHE = "requests have CACHE"
OF_DIFFUSERS = {"test_image_equals_that_of_diffusers_hook": "diffusers makes other images"}
ADAPTERS = {"neon": 0.8, "blueprint": -0.4}
"""Names as in demo/loras."""


@dataclass(frozen=True)
class Feature:
    """A feature of a server.

    Attributes:
        environment: Variables that turn it on.
        arguments: Arguments of ``generate`` for half of the requests.
        excluded: Tests, with or without their parameters, that state something else, with the reason.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


FEATURES: dict[str, Feature] = {
    "lora": Feature(
        environment={"LORA_PATH": str(Path(__file__).parents[1] / "demo" / "loras")},
        arguments={"lora": ADAPTERS},
        excluded={**OF_DIFFUSERS, "test_server_without_a_folder_has_no_adapters": "the server has a folder"},
    ),
    "cache": Feature(arguments={"cache": 0.3}, excluded={"test_images_without_cache_keep_nothing": HAS_CACHE}),
    "first-block": Feature(
        environment={"FLUX_CACHE": "first-block"},
        arguments={"cache": 0.3},
        excluded={"test_images_without_cache_keep_nothing": HAS_CACHE},
    ),
    "compile": Feature(environment={"FLUX_COMPILE": "1"}),
    "int8": Feature(
        environment={"FLUX_DTYPE": "int8"},
        excluded={
            **OF_DIFFUSERS,
            "test_mixed_images_do_not_depend_on_their_batch[magcache-sizes-padded]": PADDED,
            "test_mixed_images_do_not_depend_on_their_batch[first-block-sizes-padded]": PADDED,
        },
    ),
    "int8wo": Feature(environment={"FLUX_DTYPE": "int8wo"}, excluded=OF_DIFFUSERS),
    "t5-int8wo": Feature(environment={"FLUX_T5_DTYPE": "int8wo"}, excluded=OF_DIFFUSERS),
    "tiling": Feature(environment={"FLUX_VAE_TILING": "1"}),
    "offload": Feature(environment={"FLUX_OFFLOAD": "blocks"}),
    "deterministic": Feature(
        environment={"FLUX_DETERMINISTIC": "1"},
        excluded={
            "test_short_request_leaves_a_running_batch_early": TAKE_TURNS,
            "test_image_above_the_token_limit_runs_alone": TAKE_TURNS,
            "test_images_with_different_adapters_share_forwards": TAKE_TURNS,
            "test_heartbeats_carry_the_metrics": TAKE_TURNS,
            "test_mixed_images_do_not_depend_on_their_batch": TAKE_TURNS,
            "test_batch_that_fails_between_blocks_is_repeated_from_the_same_state": TAKE_TURNS,
        },
    ),
    "rerank-compile": Feature(environment={"RERANK_COMPILE": "1"}),
}


class FeatureError(Exception):
    """A name of no feature, or features that exclude each other."""


@dataclass(frozen=True)
class Features:
    """The features of a test run."""

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Features:
        """Return the features in a list with commas.

        Raises:
            FeatureError: See there.
        """
        names = tuple(filter(None, text.split(",")))
        if unknown := set(names) - FEATURES.keys():
            raise FeatureError(f"--features names {sorted(unknown)}; allowed: {', '.join(FEATURES)}")
        given = [item for name in names for item in FEATURES[name].environment.items()]
        if len(dict(given)) < len(given):
            raise FeatureError(f"--features {text} sets a variable twice")
        return cls(names)

    @property
    def environment(self) -> dict[str, str]:
        return {name: value for feature in self._all() for name, value in feature.environment.items()}

    @property
    def excluded(self) -> dict[str, str]:
        return {name: reason for feature in self._all() for name, reason in feature.excluded.items()}

    @property
    def takes_turns(self) -> bool:
        """Whether no images share a forward."""
        return "deterministic" in self.names

    def flux_settings(self) -> dict[str, str]:
        """Return the environment as settings of an engine."""
        marks = [(name, mark) for name, each in FluxSettings.model_fields.items() for mark in each.metadata]
        environment = self.environment
        return {name: environment[mark] for name, mark in marks if isinstance(mark, Env) and mark in environment}

    def arguments(self, seed: int) -> dict[str, Any]:
        """Return the arguments that are added to a request: of two features, both, one, the other or none."""
        with_arguments = [feature for feature in self._all() if feature.arguments]
        chosen = [feature for number, feature in enumerate(with_arguments) if (seed - number) % 4 < 2]
        return {name: value for feature in chosen for name, value in feature.arguments.items()}

    def adding(self, make_call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the client's `generate_call` with the arguments that a request has not given."""

        @functools.wraps(make_call)
        def call(prompt: str, *, seed: int, **given: Any) -> Any:
            added = {name: value for name, value in self.arguments(seed).items() if given.get(name) in (None, ())}
            return make_call(prompt, seed=seed, **{**given, **added})

        return call

    def _all(self) -> list[Feature]:
        return [FEATURES[name] for name in self.names]


chosen = Features()
"""Those of this test run: conftest.py replaces them."""
