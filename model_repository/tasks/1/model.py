"""The `tasks` model: requests in flight, load and settings, from the board that the instances write."""

from __future__ import annotations

import json
import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from genserve_backend import logs
from genserve_backend.adapter.reply import error_response
from genserve_backend.adapter.rows import MAX_TASK_ID_CHARACTERS
from genserve_backend.adapter.tensors import bytes_tensor, parse_text
from genserve_backend.board import Board
from genserve_backend.errors import InvalidInput, RequestError, ServerError

ACTIONS = ("status", "cancel", "list", "load", "config")

logger = logging.getLogger("genserve_backend.tasks")


class TritonPythonModel:
    """Interface to Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the board."""
        logs.configure()
        self.board = Board()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests, each on its own."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """Return the response: TASK as JSON (a list for the actions list, load and config), and PREVIEW."""
        try:
            task, preview = self.act(parse_text(request, "ACTION"), parse_text(request, "TASK_ID"))
        except RequestError as error:
            return error_response(error)
        except Exception:
            logger.exception("cannot read the board")
            return error_response(ServerError("the board could not be read; see the server's log"))
        outputs = [bytes_tensor("TASK", [json.dumps(task)], (1,)), bytes_tensor("PREVIEW", [preview], (1,))]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def act(self, action: str, task_id: str) -> tuple[Any, bytes]:
        """Run the action, and return TASK and PREVIEW."""
        if action not in ACTIONS:
            raise InvalidInput.of("ACTION", action, ", ".join(ACTIONS))
        listings = {"list": self.board.listing, "load": self.board.load, "config": self.board.config}
        if action in listings:
            return listings[action](), b""
        if not 1 <= len(task_id) <= MAX_TASK_ID_CHARACTERS:
            raise InvalidInput.of("TASK_ID", f"{len(task_id):,} characters long", f"1 to {MAX_TASK_ID_CHARACTERS}")
        return self.board.status(task_id) if action == "status" else self.board.cancel(task_id)

    def finalize(self) -> None:
        """Close the board."""
        self.board.close()
