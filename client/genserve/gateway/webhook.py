"""Webhooks: a task's end is told to its caller, signed as the Standard Webhooks specification says.

The database knows which caller has to be told and when, so a message outlives the gateway, and is sent at least once.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any

import aiohttp
from standardwebhooks import Webhook

from genserve.errors import InvalidInput
from genserve.gateway.addresses import Addresses
from genserve.gateway.logs import log
from genserve.gateway.loop import Loop, end
from genserve.gateway.records import StoredTask, shown
from genserve.gateway.store import Store

POLL_S = 2.0
AT_ONCE = 8
"""Messages that are sent at the same time."""
TIMEOUT_S = 15.0
TAKEN_S = 60.0
"""Seconds after which a message is sent again if its gateway has not said what became of it."""
DELAYS_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0)
"""Seconds after each failed attempt, the last of which is about eight hours after the first."""
JITTER = 0.2
PREFIX = "whsec_"
SECRET_BYTES = range(24, 65)

logger = logging.getLogger(__name__)


class Webhooks:
    """Messages to the callers of tasks that have ended.

    Args:
        store: The tasks.
        secrets: Secrets of the signatures, in base64; each of them signs.
        addresses: The rule on addresses.
        link: Function that turns a path of the gateway into a URL.

    Raises:
        ValueError: A secret has another form; the message does not contain it.
    """

    def __init__(self, store: Store, secrets: Sequence[str], addresses: Addresses, link: Callable[[str], str]) -> None:
        self._store = store
        self._signers = [Webhook(_checked(secret)) for secret in secrets]
        self._addresses = addresses
        self._link = link
        self._sending: set[asyncio.Task[None]] = set()
        self._loop = Loop(self._send_due, POLL_S)

    def check(self, url: str) -> None:
        """Refuse a URL that no message can go to.

        Raises:
            InvalidInput: There is no secret, or the URL is not allowed.
        """
        if not self._signers:
            raise InvalidInput("webhook_url is given, but this gateway has no secret to sign webhooks with")
        self._addresses.checked(url)

    def start(self) -> None:
        """Start to send, if there is a secret."""
        if self._signers:
            self._loop.start()

    def wake(self) -> None:
        """Look for messages at once: a task has ended."""
        self._loop.wake()

    async def stop(self) -> None:
        """End. What is being sent is sent again by the next gateway."""
        await self._loop.stop()
        await end(self._sending)

    async def _send_due(self) -> None:
        free = AT_ONCE - len(self._sending)
        if not free:
            return
        for task in await self._store.take_webhooks(free, TAKEN_S):
            sending = asyncio.ensure_future(self._send(task))
            self._sending.add(sending)
            sending.add_done_callback(self._sent)

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled() and (error := sending.exception()):
            log(logger, logging.WARNING, "a webhook's state is not written", error=error)
        self.wake()

    async def _send(self, task: StoredTask) -> None:
        status = await self._attempt(task)
        delivered = status is not None and HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
        pause_s = None if status == HTTPStatus.GONE else pause_after(task.webhook_attempts)
        if not delivered:
            log(
                logger, logging.INFO, "webhook not accepted", task=task.id, attempt=task.webhook_attempts, status=status
            )
        await self._store.settle_webhook(task, delivered=delivered, pause_s=pause_s)

    async def _attempt(self, task: StoredTask) -> int | None:
        """Send a message once; return the status of the answer, None without an answer."""
        body = json.dumps(message(task, self._link), separators=(",", ":"))
        try:
            url = self._addresses.checked(task.webhook_url or "")
            async with (
                aiohttp.ClientSession(
                    connector=self._addresses.connector(url), timeout=aiohttp.ClientTimeout(TIMEOUT_S)
                ) as session,
                session.post(url, data=body, headers=self._headers(task, body), allow_redirects=False) as answer,
            ):
                return answer.status
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, InvalidInput, ValueError) as error:
            log(logger, logging.INFO, "webhook not sent", task=task.id, error=f"{type(error).__name__}: {error}")
            return None

    def _headers(self, task: StoredTask, body: str) -> dict[str, str]:
        # The same in each attempt: by it, the caller knows a message that has come before.
        message_id = f"msg_{task.id}"
        sent = datetime.now(timezone.utc).replace(microsecond=0)
        return {
            "Content-Type": "application/json",
            "User-Agent": "GenServe",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(sent.timestamp())),
            "webhook-signature": " ".join(signer.sign(message_id, sent, body) for signer in self._signers),
        }


def _checked(secret: str) -> str:
    """Return a secret if it is one of the specification's."""
    try:
        length = len(base64.b64decode(secret.removeprefix(PREFIX), validate=True))
    except ValueError:
        length = 0
    if length not in SECRET_BYTES:
        raise ValueError(
            "the webhook secret has another form; allowed: 24 to 64 bytes in base64, with or without whsec_"
        )
    return secret


def message(task: StoredTask, link: Callable[[str], str]) -> dict[str, Any]:
    """Return the message on a task that has ended."""
    ended = datetime.fromtimestamp(task.ended or 0.0, timezone.utc)
    return {"type": f"task.{task.state}", "timestamp": ended.isoformat(), "data": shown(task, link)}


def pause_after(attempts: int) -> float | None:
    """Return the seconds to wait after the last of some failed attempts, None to give up."""
    if attempts > len(DELAYS_S):
        return None
    return DELAYS_S[attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # not security-relevant
