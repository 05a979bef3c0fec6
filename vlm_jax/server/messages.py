# SPDX-License-Identifier: Apache-2.0
"""Messages of a request become the turns of a conversation, with a mark where each image stands.

The images of a message stand where the model's template places one (first, in LLaVA's), wherever
the client wrote them: clients put the text first. Images with text between them stay where they
are, and so do marks in the text, as in LLaVA's files: <image> stands for the next image.
"""

from dataclasses import dataclass

from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.server import fields
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.schema import ChatRequest, ImagePart, ImageUrl, Message, TextPart


@dataclass(frozen=True)
class Placed:
    """An image of a request, and its field for messages about it."""

    image: ImageUrl
    where: str


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn, the last one a question; its images in their order.

    `system` is the text of the system message, None without one.
    """

    turns: tuple[str, ...]
    images: tuple[Placed, ...]
    system: str | None = None


def conversation(request: ChatRequest, *, image: str, images_first: bool) -> Conversation:
    """The conversation of a request.

    Args:
      image: what the model's template writes for one image.
      images_first: whether it writes them before the question.
    Raises:
      Refusal: for messages that are not a system text, then questions and answers in turn.
    """
    messages = list(request.messages)
    for number, message in enumerate(messages):
        fields.check(message.model_extra or {}, fields.OF_MESSAGE, f"messages[{number}].")
    system, first = None, 0
    if messages[0].role in ("system", "developer"):
        system, first = _text(messages[0], "messages[0]"), 1
        if not system.strip():
            raise Refusal("an empty system message: leave it out", param="messages[0].content")
    turns: list[str] = []
    placed: list[Placed] = []
    parts: list[list[TextPart | ImagePart]] = []
    for number in range(first, len(messages)):
        message, where = messages[number], f"messages[{number}]"
        expected = "assistant" if (number - first) % 2 else "user"
        if message.role != expected:
            raise Refusal(_out_of_turn(message.role, expected), param=f"{where}.role")
        if expected == "assistant":
            parts.append([TextPart(type="text", text=_text(message, where))])
            continue
        content = message.content
        of_message = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        parts.append(list(of_message))
        placed += [
            Placed(part.image_url, f"{where}.content[{k}]")
            for k, part in enumerate(of_message)
            if isinstance(part, ImagePart)
        ]
    if len(parts) % 2 == 0:
        raise Refusal("the last message is not of the user: end with a question", param="messages")
    marked = any(
        IMAGE_MARK in part.text for of in parts for part in of if isinstance(part, TextPart)
    )
    # Images of the first question alone need no mark: its template places them.
    everywhere = any(isinstance(part, ImagePart) for of in parts[2::2] for part in of)
    for of_message in parts:
        turns.append(
            _plain(of_message)
            if marked or not (everywhere or _apart(of_message))
            else _marked(of_message, image, images_first)
        )
    return Conversation(tuple(turns), tuple(placed), system)


def _plain(parts: list[TextPart | ImagePart]) -> str:
    """The texts of a message; several are lines."""
    return "\n".join(part.text for part in parts if isinstance(part, TextPart))


def _apart(parts: list[TextPart | ImagePart]) -> bool:
    """Whether text stands between two images of a message."""
    kinds = [isinstance(part, ImagePart) for part in parts]
    if sum(kinds) < 2:
        return False
    first, last = kinds.index(True), len(kinds) - 1 - kinds[::-1].index(True)
    return not all(kinds[first : last + 1])


def _marked(parts: list[TextPart | ImagePart], image: str, images_first: bool) -> str:
    """The text of a message with a mark for each of its images."""
    if _apart(parts):
        return "\n".join(part.text if isinstance(part, TextPart) else IMAGE_MARK for part in parts)
    marks = image * sum(isinstance(part, ImagePart) for part in parts)
    text = _plain(parts)
    return marks + text if images_first else text + marks


def _text(message: Message, where: str) -> str:
    """The text of a message without images."""
    if isinstance(message.content, str):
        return message.content
    if any(isinstance(part, ImagePart) for part in message.content):
        raise Refusal(
            f"an image in a message of the {message.role}: images belong to messages of the user",
            param=f"{where}.content",
        )
    return _plain(list(message.content))


def _out_of_turn(role: str, expected: str) -> str:
    """What to do about a message of the wrong role."""
    if role in ("system", "developer"):
        return f"a message of the {role} after the first: instructions go into the first message"
    if role == "assistant":
        return "a message of the assistant where the user's is expected: begin with a question"
    return (
        f"a message of the {role} where the {expected}'s is expected: join messages of the same "
        "role into one"
    )
