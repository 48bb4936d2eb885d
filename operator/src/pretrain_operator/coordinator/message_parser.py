"""Parser of agents' messages. Text that is no message is refused for one of a few reasons, which a metric counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import ValidationError

from pretrain_api.bounds import MAX_TEXT
from pretrain_api.messages.protocol import AGENT_MESSAGE, AgentMessage

RefusalReason = Literal["Malformed", "UnknownKind", "Invalid", "OutOfBounds", "WrongProcesses"]

_BOUNDS = frozenset(
    {
        "finite_number", "greater_than", "greater_than_equal", "int_from_float", "int_parsing_size", "less_than",
        "less_than_equal", "string_too_long", "too_long",
    }
)  # fmt: skip
_JSON_BOUNDS = ("number out of range", "recursion limit exceeded")


@dataclass(frozen=True)
class Refusal:
    """A refused message; the text names the field."""

    reason: RefusalReason
    message: str
    pod: tuple[int, int] | None = None
    """(slot, attempt) of the worker; None: unknown."""

    @property
    def is_failure(self) -> bool:
        """No worker of any version sends such a message: the worker has failed."""
        return self.reason in ("OutOfBounds", "WrongProcesses")


def parse_message(text: str) -> AgentMessage | Refusal:
    """Parse a message of an agent."""
    try:
        return AGENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        problems = cast(list[dict[str, Any]], error.errors(include_url=False, include_input=False))
        worst = next((problem for problem in problems if _reason(problem) == "OutOfBounds"), problems[0])
        where = ".".join(str(part) for part in worst["loc"])
        message = f"invalid message: {where + ': ' if where else ''}{worst['msg']}"
        return Refusal(_reason(worst), message[:MAX_TEXT])  # it may quote the peer


def _reason(problem: dict[str, Any]) -> RefusalReason:
    kind = problem["type"]
    if kind in _BOUNDS:
        return "OutOfBounds"
    if kind == "json_invalid":
        return "OutOfBounds" if problem["ctx"]["error"].startswith(_JSON_BOUNDS) else "Malformed"
    return "UnknownKind" if kind.startswith("union_tag") else "Invalid"
