"""From a row of any known layout to a conversation: functions with no state.

========================  =====================================================================================
layout                    a row
========================  =====================================================================================
``"messages"``            ``messages``: a list of ``{"role": "system" | "user" | "assistant", "content": text}``, or
                          ``conversations`` (ShareGPT): ``{"from": "system" | "human" | "gpt", "value": text}``
``"prompt-completion"``   ``prompt`` and ``completion``: two texts, or two lists of messages
``"alpaca"``              ``instruction``, ``input`` (may be empty) and ``output``
========================  =====================================================================================

Each may have a text ``system``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_peft.data.sources.records import BadRowError, require_text

FORMATS = ("auto", "messages", "prompt-completion", "alpaca")

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side says."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Perhaps a system turn, then user and assistant in turn.

    Attributes:
        turns: The turns.
        first: Index from which on assistant turns are completions; those before it belong to a given prompt.
        verbatim: True if prompt and completion are texts that join as they are.
    """

    turns: tuple[Turn, ...]
    first: int = 0
    verbatim: bool = False

    @property
    def completions(self) -> list[int]:
        """Indices of the assistant turns that are completions."""
        return [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and i >= self.first]


def read_conversation(
    row: Mapping[str, Any],
    layout: str = "auto",
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    system_prompt: str | None = None,
    answered: bool = True,
) -> Conversation:
    """Read a row.

    Args:
        row: The row.
        layout: One of :data:`FORMATS`; ``"auto"`` takes the first whose columns the row has.
        prompt_column: Column of the prompt of ``"prompt-completion"``.
        completion_column: Column of its completion.
        system_prompt: Text of the system turn where the row has none.
        answered: True if the row must end with a completion.

    Raises:
        BadRowError: If it has no prompt or completion, is not text, or the roles are in a wrong order.
    """
    if layout == "auto":
        layout = _find_layout(row, prompt_column)
    if layout == "messages":
        # Not `in`: a file with columns gives each row all of them, with None where there is nothing.
        column = "messages" if row.get("messages") is not None else "conversations"
        conversation = Conversation(turns=_read_messages(row.get(column), column))
    elif layout == "alpaca":
        instruction = require_text(row.get("instruction"), "instruction", "no prompt")
        if row.get("input") not in (None, ""):
            instruction += "\n\n" + require_text(row["input"], "input", "no prompt")
        conversation = _join(instruction, row.get("output"), "output", answered)
    elif isinstance(prompt := row.get(prompt_column), list):
        conversation = _join(prompt, row.get(completion_column), completion_column, answered, prompt_column)
    else:
        prompt = require_text(prompt, prompt_column, "no prompt")
        conversation = _join(prompt, row.get(completion_column), completion_column, answered, verbatim=True)
    system = row.get("system") or system_prompt
    if system is not None and conversation.turns[0].role != "system":
        turn = Turn(role="system", content=require_text(system, "system", "not text"))
        conversation = replace(conversation, turns=(turn, *conversation.turns), first=conversation.first + 1)
    _require_order(conversation.turns, answered)
    return conversation


def _find_layout(row: Mapping[str, Any], prompt_column: str) -> str:
    columns = {"messages": "messages", "conversations": "messages"}
    columns |= {prompt_column: "prompt-completion", "instruction": "alpaca"}
    there = [layout for column, layout in columns.items() if row.get(column) is not None]
    if there:
        return there[0]
    empty = [layout for column, layout in columns.items() if column in row]
    if empty:  # the reader of that layout then names the empty column
        return empty[0]
    raise BadRowError("of no known layout", f"has {', '.join(map(repr, row)) or 'nothing'}, none of {list(columns)}")


def _join(
    prompt: Any, completion: Any, column: str, answered: bool, prompt_column: str = "", verbatim: bool = False
) -> Conversation:
    turns = _read_messages(prompt, prompt_column) if prompt_column else (Turn(role="user", content=prompt),)
    first = len(turns)
    if isinstance(completion, list):
        turns += _read_messages(completion, column)
    elif answered or completion not in (None, ""):
        turns += (Turn(role="assistant", content=require_text(completion, column, "no completion")),)
    return Conversation(turns=turns, first=first, verbatim=verbatim)


def _read_messages(messages: Any, column: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BadRowError("not a list of messages", f"{column!r}")
    if not messages:
        raise BadRowError("no prompt", f"{column!r} is empty")
    turns = []
    for number, message in enumerate(messages):
        given = message.get("role") or message.get("from")
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise BadRowError("of an unknown role", f"{given!r} is none of {', '.join(_ROLES)}")
        # Not `or`: an empty content is to be reported, where a key that Arrow filled in with None is not.
        content = message["content"] if message.get("content") is not None else message.get("value")
        missing = "no completion" if role == "assistant" else "no prompt"
        turns.append(Turn(role=role, content=require_text(content, f"{column}[{number}]", missing)))
    return tuple(turns)


def _require_order(turns: tuple[Turn, ...], answered: bool) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(spoken)):
        raise BadRowError("in wrong role order", f"{', '.join(roles[:6])}{', …' if len(roles) > 6 else ''}")
    if not spoken:
        raise BadRowError("no prompt", "only a system turn")
    if answered and spoken[-1] != "assistant":
        raise BadRowError("no completion", "the last turn is the user's")
