"""The features of ``pytest --features``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from features import FEATURES, FeatureError, Features

from genserve_backend.settings import Env, FluxSettings, RerankSettings

TESTS = Path(__file__).parents[1]


def test_variables_are_those_of_settings() -> None:
    fields = [field for kind in (FluxSettings, RerankSettings) for field in kind.model_fields.values()]
    known = {str(mark) for field in fields for mark in field.metadata if isinstance(mark, Env)}
    assert {name for feature in FEATURES.values() for name in feature.environment} <= known


def test_make_runs_every_feature_by_itself() -> None:
    makefile = (TESTS.parent / "Makefile").read_text()
    (listed,) = re.findall(r"^FEATURES := (.*?[^\\])$", makefile, re.MULTILINE | re.DOTALL)
    sets = listed.replace("\\\n", " ").split()
    assert [name for name in sets if "," not in name] == list(FEATURES)
    for names in sets:
        Features.parse(names)


def test_excluded_tests_exist() -> None:
    defined = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert {name.partition("[")[0] for feature in FEATURES.values() for name in feature.excluded} <= defined


def test_requests_have_every_mixture_of_two_features() -> None:
    both = Features.parse("lora,cache")
    assert {tuple(both.arguments(seed)) for seed in range(4)} == {(), ("lora",), ("cache",), ("lora", "cache")}
    assert sum(bool(Features.parse("cache").arguments(seed)) for seed in range(8)) == 4


def test_arguments_of_a_request_stay() -> None:
    call = Features.parse("lora,cache").adding(lambda prompt, **given: given)
    assert call("x", seed=1, lora="own", cache=None) == {"seed": 1, "lora": "own", "cache": 0.3}
    assert call("x", seed=3, lora=(), cache=None) == {"seed": 3, "lora": (), "cache": None}


def test_features_become_settings() -> None:
    assert Features.parse("int8,tiling,rerank-compile").flux_settings() == {"dtype": "int8", "vae_tiling": "1"}


@pytest.mark.parametrize("text", ["speed", "int8,int8wo", "lora,lora"], ids=str)
def test_unknown_and_contradicting_features_are_rejected(text: str) -> None:
    with pytest.raises(FeatureError, match="--features"):
        Features.parse(text)
