"""Settings of the gateway, parsed once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_PORT = 12411
MEBIBYTE = 2**20


class GatewaySettings(BaseModel):
    """Settings of one gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the gateway; none by default."""
    max_body_bytes: int = Field(default=8 * MEBIBYTE, ge=1024)
    """Largest accepted request body. 1,000 documents of 8,000 characters fit."""
    retry_after_s: int = Field(default=1, ge=1)
    """Seconds in the Retry-After header of a refusal, unless the server said so itself."""
