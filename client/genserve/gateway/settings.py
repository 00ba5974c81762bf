"""Settings of the gateway, parsed once."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from genserve.gateway.limiter import Limits
from genserve.gateway.names import Model

DEFAULT_PORT = 12411
MEBIBYTE = 2**20


class GatewaySettings(BaseModel):
    """Settings of one gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the gateway; none by default."""
    aliases: dict[str, Model] = Field(default_factory=dict)
    """Further names of the models in requests."""
    keys: str | None = None
    """Path of a file of keys, or its lines; None admits everybody."""
    limits: Limits = Limits()
    """Limits of each key that has none of its own; without keys, of each address."""
    max_body_bytes: int = Field(default=8 * MEBIBYTE, ge=1024)
    """Largest accepted request body. 1,000 documents of 8,000 characters fit."""
    max_bodies_bytes: int = Field(default=512 * MEBIBYTE, ge=1024)
    """Limit of the request bodies in flight together. Further ones are refused with 503."""
    retry_after_s: int = Field(default=1, ge=1)
    """Seconds in the Retry-After header of a refusal, unless the server said so itself."""
    public_url: str = ""
    """The gateway's address for its callers, for the URLs of files; empty if it is not known."""
    tasks: str | None = None
    """Address of the database of durable tasks; None keeps none."""
    max_tasks: int = Field(default=10_000, ge=1)
    """Limit on the tasks that are not finished. Further ones are refused with 503."""
    keep_tasks_s: float = Field(default=86_400.0, gt=0)
    """Seconds that a finished task is kept, with its image."""
    results: Path | None = None
    """Folder of the images; None puts it next to the database."""
    keep_files_s: float = Field(default=3_600.0, gt=0)
    """Seconds that an image is kept which was answered as a URL."""
    webhook_secret: SecretStr = SecretStr("")
    """Secret of the webhooks' signatures, in base64; several with spaces in between all sign. Empty refuses them."""
    webhook_allow: tuple[str, ...] = ()
    """Networks and hosts that webhooks may go to although they are not public."""

    @field_validator("public_url")
    @classmethod
    def _checked_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme not in {"http", "https"} or not parts.netloc or parts.query or parts.fragment):
            raise ValueError("the public URL has another form; allowed: as https://images.example.org")
        return url.rstrip("/")

    def public_link(self, path: str) -> str:
        """Return the URL of a path of the gateway; without a public URL, the path itself."""
        return f"{self.public_url}{path}"
