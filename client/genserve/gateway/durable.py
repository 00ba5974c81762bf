"""Durable tasks and files of one gateway, from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from genserve.aio import AsyncClient
from genserve.gateway.addresses import Addresses
from genserve.gateway.database import database_url, is_sqlite, state_folder
from genserve.gateway.files import ResultFiles
from genserve.gateway.loop import Loop
from genserve.gateway.runner import Runner
from genserve.gateway.settings import GatewaySettings
from genserve.gateway.store import SWEPT, Store
from genserve.gateway.webhook import Webhooks

SWEEP_S = 30.0
"""Seconds between two removals of expired tasks and files."""


@dataclass(frozen=True)
class Tasks:
    """Parts that keep and run tasks."""

    store: Store
    runner: Runner
    webhooks: Webhooks


class Durable:
    """Durable tasks and files of one gateway.

    Args:
        settings: The gateway's settings.
        client: Client of the servers.

    Attributes:
        files: The images; None if there is no folder for them.
        tasks: The tasks; None if the settings name no database.

    Raises:
        ValueError: A setting is not usable.
        OSError: The folder of the database cannot be created.
    """

    def __init__(self, settings: GatewaySettings, client: AsyncClient) -> None:
        url = database_url(settings.tasks) if settings.tasks else None
        folder = settings.results or (default_results(url) if url else None)
        self.files = ResultFiles(folder) if folder else None
        self.tasks: Tasks | None = None
        self._sweeping = Loop(self._sweep, SWEEP_S)
        if url and self.files:
            keep_s = settings.keep_tasks_s
            store = Store(url, keep_s=keep_s, max_unfinished=settings.max_tasks)
            secrets = settings.webhook_secret.get_secret_value().split()
            webhooks = Webhooks(store, secrets, Addresses(settings.webhook_allow), settings.public_link)
            runner = Runner(store, self.files, client, keep_s=keep_s, on_end=webhooks.wake)
            self.tasks = Tasks(store, runner, webhooks)

    async def __aenter__(self) -> Durable:
        if self.tasks:
            await self.tasks.store.open()
            self.tasks.runner.start()
            self.tasks.webhooks.start()
        self._sweeping.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sweeping.stop()
        if self.tasks:
            await self.tasks.runner.stop()
            await self.tasks.webhooks.stop()
            await self.tasks.store.close()

    async def _sweep(self) -> None:
        if self.files is None:
            return
        await self.files.sweep()
        removed = SWEPT if self.tasks else 0
        while self.tasks and removed == SWEPT:
            removed, names = await self.tasks.store.sweep()
            for name in names:
                await self.files.remove(name)


async def prepare(url: str) -> None:
    """Create the table of tasks, to find a wrong address before the gateway starts.

    Raises:
        ServerUnavailable: The database cannot be used.
        ValueError: The address is not usable.
        OSError: The folder of the database cannot be created.
    """
    store = Store(database_url(url), keep_s=0.0, max_unfinished=0)
    try:
        await store.open()
    finally:
        await store.close()


def default_results(url: URL) -> Path:
    """Return the folder for images: next to an SQLite file, else in the state folder."""
    folder = Path(url.database or "").absolute().parent if is_sqlite(url) else state_folder()
    return folder / "results"
