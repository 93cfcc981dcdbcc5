"""Dialogs as sequences of ids: the [INST] and the Source/<step> formats, with the loss mask.

A tokenizer that knows `<step>` (70B Instruct) takes the second format, every other one the first.
Both are built from ids: contents are encoded as plain text and cannot act as control ids. Contents
with one of the formats' own tags are refused before anything is computed.

    [INST]   per exchange BOS E("[INST] user [/INST] answer ") EOS, for the last question
             BOS E("[INST] user [/INST]"); a system text goes into the first user message,
             between <<SYS>> and <</SYS>>
    Source   BOS, then per message E0(" Source: role"), E0("\\n\\n content"), <step>; at the end the
             opener E0(" Source: assistant\\nDestination: user"), E0("\\n\\n ")

Source: `chat_completion` of the reference implementation (fact sheet section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<step>")
REPLY_HEADER = " Source: assistant\nDestination: user"
REPLY_GAP = "\n\n "


class Message(TypedDict):
    """One turn of a dialog; `destination` is used by the Source format only."""

    role: str
    content: str
    destination: NotRequired[str]


def dialog_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids after which a model writes the assistant's next message.

    Raises:
        ValueError: no messages, an unknown role, roles out of order, a last message that is not the
            user's, or a tag of the format inside a message.
    """
    ids: list[int] = []
    for part, _ in _parts(tokenizer, check_dialog(messages, last="user")):
        ids += part
    return ids


def dialog_example(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a dialog that ends with an answer, and which of them to learn from.

    The mask is true on what the assistant wrote and on the id that ends it. The ids begin with
    `dialog_prompt` of all messages but the last.

    Raises:
        ValueError: as `dialog_prompt`, except that the last message must be the assistant's.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for part, learn in _parts(tokenizer, check_dialog(messages, last="assistant")):
        ids += part
        mask += [learn] * len(part)
    return ids, mask


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: EOS, and `<step>` where the model has it."""
    return (
        (tokenizer.eos_id,) if tokenizer.step_id is None else (tokenizer.eos_id, tokenizer.step_id)
    )


def check_dialog(messages: Sequence[Message], last: str = "user") -> list[Message]:
    """Verify a dialog without encoding it; costs nothing compared with a forward pass.

    Raises:
        ValueError: names the message and says what is accepted.
    """
    if not messages:
        raise ValueError("the dialog is empty; it needs at least one user message")
    checked = list(messages)
    for n, message in enumerate(checked):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {n}: expected a role and a content, both text")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"message {n}: unknown role {message.get('role')!r}; accepted: {', '.join(ROLES)}"
            )
        for text in (message["content"], message.get("destination") or ""):
            tag = next((tag for tag in TAGS if tag in text), None)
            if tag is not None:
                raise ValueError(
                    f"message {n}: special tags are not allowed as part of the prompt; found {tag}"
                )
    first = int(checked[0]["role"] == "system")
    for n, message in enumerate(checked[first:], first):
        expected = "assistant" if (n - first) % 2 else "user"
        if message["role"] != expected:
            raise ValueError(
                f"message {n}: role {message['role']!r} where {expected!r} is due; after an "
                "optional system message, user and assistant alternate"
            )
    if checked[-1]["role"] != last:
        raise ValueError(f"the last message must be of role {last!r}, not {checked[-1]['role']!r}")
    return checked


Part = tuple[list[int], bool]


def _parts(tokenizer: Tokenizer, messages: list[Message]) -> list[Part]:
    """Ids in order, each run with whether the assistant wrote it."""
    if tokenizer.step_id is None:
        return _inst_parts(tokenizer, messages)
    return _source_parts(tokenizer, messages, tokenizer.step_id)


def _inst_parts(tokenizer: Tokenizer, messages: list[Message]) -> list[Part]:
    system = ""
    if messages[0]["role"] == "system":
        system = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
        messages = messages[1:]
    parts: list[Part] = []
    for n in range(0, len(messages), 2):
        user = messages[n]["content"] if n else system + messages[0]["content"]
        asked = f"[INST] {user.strip()} [/INST]"
        question = tokenizer.encode(asked)
        if n + 1 == len(messages):
            parts.append(([tokenizer.bos_id, *question], False))
            continue
        # Question and answer are one text; the answer begins where the ids first differ.
        whole = tokenizer.encode(f"{asked} {messages[n + 1]['content'].strip()} ")
        start = _shared(question, whole)
        parts.append(([tokenizer.bos_id, *whole[:start]], False))
        parts.append(([*whole[start:], tokenizer.eos_id], True))
    return parts


def _source_parts(tokenizer: Tokenizer, messages: list[Message], step: int) -> list[Part]:
    encode = tokenizer.encode_without_prefix_space  # the texts bring their own spaces
    gap = encode(REPLY_GAP)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    parts: list[Part] = [([tokenizer.bos_id], False)]
    for n, message in enumerate(messages):
        text = message["content"].strip()
        if n == len(messages) - 1 and message["role"] == "assistant":
            # What training shows is what generation will see: the reply opener, then the answer.
            parts += [([*encode(REPLY_HEADER), *gap], False), ([*encode(text), step], True)]
            continue
        header = f" Source: {message['role']}"
        if message.get("destination"):
            header += f"\nDestination: {message.get('destination')}"
        body = encode(REPLY_GAP + text) if message["content"] else []
        start = _shared(gap, body)
        parts.append(([*encode(header), *body[:start]], False))
        parts.append(([*body[start:], step], message["role"] == "assistant"))
    if messages[-1]["role"] == "user":
        parts.append(([*encode(REPLY_HEADER), *gap], False))
    return parts


def _shared(left: list[int], right: list[int]) -> int:
    """How many ids two lists have in common from the start."""
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
