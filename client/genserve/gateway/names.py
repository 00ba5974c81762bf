"""Names of models in requests: the server's own, and those that programs have built in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

from genserve.gateway.errors import UNKNOWN_MODEL, Failure

Model = Literal["flux", "rerank"]
"""Model that callers can name; `tasks` is the third."""

_BUILT_IN: dict[Model, re.Pattern[str]] = {
    # FLUX's own names, as black-forest-labs/FLUX.1-dev and flux1-dev; the two of OpenAI's that many programs insist on.
    "flux": re.compile("flux|dall-e|gpt-image", re.IGNORECASE),
    # rerank-v3.5, jina-reranker-v2-base-multilingual, BAAI/bge-reranker-v2-m3, nvidia/llama-3.2-nv-rerankqa-1b-v2.
    "rerank": re.compile("rerank", re.IGNORECASE),
}
"""Pattern of the names of each kind of model. There is one model of each kind, so it answers to all of them."""


def checked(given: str | None, model: Model, aliases: Mapping[str, Model], *, parameter: str = "model") -> str:
    """Return the name for the answer: the given one, or the server's own without one.

    Args:
        given: The name in the request.
        model: The model that the route serves.
        aliases: Further names, with their models.
        parameter: The field's name in the request.

    Raises:
        Failure: The name is not this model's.
    """
    if not given:
        return model
    known = aliases.get(given)
    if known == model or (known is None and _BUILT_IN[model].search(given)):
        return given
    raise unknown(given, allowed=model, parameter=parameter)


def unknown(given: str, *, allowed: str = "the names in /v1/models", parameter: str = "model") -> Failure:
    """Return the failure of a request that names a model which is not served."""
    message = f"{parameter} is {given!r:.80}, which is not served here; allowed: {allowed}"
    return Failure(HTTPStatus.NOT_FOUND, UNKNOWN_MODEL, message, parameter=parameter)
