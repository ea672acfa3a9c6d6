"""Conversations as rows of text, through the chat template of the model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from blockpruner.engine.errors import UserError, first_line
from blockpruner.engine.sections import ChatTemplate

if TYPE_CHECKING:
    from blockpruner.engine.text.rows import Rows

Conversation = list[dict[str, Any]]
"""Messages with `role` and `content`, as chat templates take them."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip
"""Speakers of ShareGPT's conversations (`from`, `value`), and the roles that they have."""
TODAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%a": "Fri", "%A": "Friday"}
"""Date for templates that write today's. With the real date, the same text would give other windows tomorrow."""
SAME_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in TODAY.items())
    + " }}{% endmacro %}{{ '' }}"
)
"""Takes the place of the function that gives templates the date. The end keeps a line end that follows."""


def as_conversation(value: Any, where: str, row: int) -> Conversation:
    """Check a list of messages, and turn ShareGPT's form into the one with `role` and `content`."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise _wrong(where, row, "something else")
    return [_message(message, where, row) for message in value]


def as_texts(
    rows: Rows, chosen: Iterable[int], tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate
) -> tuple[list[str], tuple[str, ...]]:
    """Return the chosen rows as texts, and what is to be said about that.

    A template's own BOS token at the beginning is left out: the option `bos` says where BOS tokens stand.
    """
    if not rows.are_chat:
        return [rows.values[index] for index in chosen], rows.notes  # type: ignore[misc]
    where = f"column {rows.column!r} of {rows.source!r}"
    if chat_template is ChatTemplate.NONE:
        raise UserError(f"expected texts in {where}, got conversations; use `chat_template=auto`.")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"expected a tokenizer with a chat template, because {where} holds conversations; give texts, or the model "
            f"whose tokenizer has one."
        )
    note = f"the tokenizer's chat template was applied to the conversations in {where}"
    return [_rendered(rows.values[index], tokenizer, where, index) for index in chosen], (*rows.notes, note)


def _message(message: dict[str, Any], where: str, row: int) -> dict[str, Any]:
    if "role" in message:
        content = message.get("content")
        if not isinstance(message["role"], str) or not isinstance(content, str | list | None):
            raise _wrong(where, row, "other types")
        return {name: value for name, value in message.items() if value is not None or name == "content"}
    speaker, text = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise _wrong(where, row, f"the keys {', '.join(map(ascii, message))}")
    if speaker not in ROLES:
        raise UserError(f"expected {', '.join(ROLES)} as `from` in {where}, got {speaker!r} in conversation {row}.")
    return {"role": ROLES[speaker], "content": text}


def _rendered(conversation: str | Conversation, tokenizer: PreTrainedTokenizerBase, where: str, index: int) -> str:
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = SAME_DAY + template
        text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program that comes with the tokenizer
        raise UserError(
            f"the tokenizer's chat template does not take conversation {index + 1} in {where} "
            f"({first_line(error)[:200]}); repair it, or choose other rows."
        ) from error
    if not isinstance(text, str):
        raise UserError(f"expected a chat template that gives a text, got {type(text).__name__}.")
    return text.removeprefix(tokenizer.bos_token or "")


def _wrong(where: str, row: int, got: str) -> UserError:
    return UserError(
        f"expected texts or lists of messages (`role` and `content`, or `from` and `value`) in {where}, got {got} in "
        f"row {row}."
    )
