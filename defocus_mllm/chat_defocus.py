"""A conversation to token ids, the same for training and for inference.

Two rules make the prompt of a question, followed by its answer, the ids that training saw:

- Ids are cut where an answer begins. What the template writes up to there is the prompt of inference; no token may
  reach across, since generation starts with a new one.
- Only the template writes control tokens. What a message says is encoded as the characters it is written with, be it
  `</s>`, `<image>` or `<|im_end|>`.

An answer is what follows its prompt, up to and with the control token that ends its turn; that is what is learnt.
Nothing is searched for in what a message says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text."""

# Characters without a meaning, to mark what looks like a control token in a message while the template is rendered.
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]
# What an encoder for the middle of a text may be asked to encode in front of it, to be cut off again.
_ANCHORS = ("\n", "a", ".")
_MOST_CACHED_TEXTS = 100_000
_MOST_CACHED_FORMS = 10_000
# A text that no template changes.
_SLOT = "\uf8fftext\uf8ff"
Form = tuple[str, tuple[str, ...] | None]
"""Role and kinds of parts of a message; None for a plain text."""
Pieces = tuple[list[str], list[str]]


Turn = tuple[Message, str, str]
"""An answer, the prompt of inference that leads to it, and the text up to and with its turn."""


class ChatError(ValueError):
    """A conversation that cannot be encoded with this chat template and tokenizer."""


@dataclass(frozen=True)
class Chat:
    """An encoded conversation."""

    text: str
    """What the template makes of it."""
    ids: list[int]
    """A single one for each image."""
    answered: list[bool]
    """For each id whether it belongs to an answer, the end of its turn included."""
    ends: list[int | None]
    """For each answer the control token that ends it; None if the template writes none."""
    safe: bool
    """Whether no message holds anything that could be taken for a control token."""


class ChatEncoder:
    """Encodes conversations for one tokenizer and chat template, and remembers texts it has seen.

    Args:
        tokenizer: of any kind, fast or slow.
        chat_template: the Jinja template, which says what tokens besides the special ones are control tokens.
    """

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_tokens)  # some are not marked as such
        # Tokens that are not special are words, such as runs of spaces, unless the template writes them as its marks.
        self._controls = {
            token.content: (number, token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content and (token.special or token.content in special or token.content in chat_template)
        }
        self._control_ids = {number for number, _ in self._controls.values()} - {tokenizer.unk_token_id}
        whole = _alternatives(self._controls)
        beginnings = _alternatives({token[:length] for token in self._controls for length in range(1, len(token))})
        self.has_marks = tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None
        """Whether the template says by marks of its own what is the assistant's, and the tokenizer can follow them."""
        self._pattern = whole
        self._characters = set(chat_template).union(*self._controls)
        # The first character of each control token in a message, and of one that what follows could complete.
        self._suspicious = re.compile(rf"(?s)(?=(?:{whole})|(?:{beginnings})\s*\Z).")
        self._texts: dict[tuple[str, str, bool], list[int]] = {}
        self._fresh_behind: dict[str, bool] = {}
        self._pairs: dict[tuple[tuple[Form, ...], tuple[Form, ...]], Pieces | None] = {}
        self._proven: set[tuple[Form, ...]] = set()
        self._adds_space = False  # while it is tried out
        self._adds_space = self._plain_ids("a", True) != self._inside_ids("a")

    def encode(
        self, messages: Sequence[Message], render: Render, add_generation_prompt: bool = False, remember: bool = True
    ) -> Chat:
        """The ids of a conversation, the beginning token included if template or tokenizer write one.

        With `remember` what `render` makes of the same messages with other texts is not asked for again.

        Raises ChatError for an answer without a question, and where the template does not keep to a prompt followed by
        its answer: a later message changes an earlier one, or an answer is not written, or not whole.
        """
        mark = self._unused_mark(messages)
        marked = [self._mark(message, mark) for message in messages]
        text = render(marked, add_generation_prompt)
        finder = _finder(self._pattern, mark)
        spans, ends = [], []
        turns = self._remembered_turns(marked, text, render) if remember else None
        turns = turns or _turns(marked, text, render, add_generation_prompt)
        for message, prompt, turn in turns:
            begin, end, control = _answer(message, (prompt, turn, text), finder)
            spans.append((begin, end))
            ends.append(self._controls[control][0] if control else None)
        ids = self._begin_ids(text)
        answered = [False] * len(ids)
        fresh = True
        for begin, end, said in _stretches(spans, len(text)):
            for piece, control in self._cut(text[begin:end], finder):
                piece_ids, fresh = self._ids(piece, control, mark, fresh)
                ids += piece_ids
                answered += [said] * len(piece_ids)
        return Chat(text.replace(mark, ""), ids, answered, ends, safe=mark not in text)

    def whole_ids(self, text: str) -> list[int]:
        """What the tokenizer alone makes of a rendered conversation, as Transformers calls it."""
        begin = self.tokenizer.bos_token
        written = begin is not None and text.startswith(begin)
        return self.tokenizer(text, add_special_tokens=not written)["input_ids"]

    def mark_safely(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with an unused character in whatever could be taken for a control token."""
        mark = self._unused_mark(messages)
        return [self._mark(message, mark) for message in messages]

    # --- marks ----------------------------------------------------------------------------------------------------

    def _unused_mark(self, messages: Sequence[Message]) -> str:
        used = self._characters.union(*(text for message in messages for text in message_texts(message)))
        for mark in _MARKS:
            if mark not in used:
                return mark
        raise ChatError("the conversation holds all characters of Unicode's private use area; remove them")

    def _mark(self, message: Message, mark: str) -> Message:
        def marked(text: str) -> str:
            return self._suspicious.sub(lambda found: found.group() + mark, text)

        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": marked(content)}
        if content is None:
            return message
        parts = [
            {**part, "text": marked(part["text"])} if isinstance(part.get("text"), str) else part for part in content
        ]
        return {**message, "content": parts}

    # --- answers --------------------------------------------------------------------------------------------------

    def _remembered_turns(self, messages: list[Message], text: str, render: Render) -> list[Turn] | None:
        """What `_turns` gives, from pairs of the same form rendered before, behind a first pair alone.

        None unless these, with the texts put in, add up to the whole text. The last prompt is rendered as it is, once
        for each form of conversation.
        """
        start = 1 if messages[0].get("role") == "system" else 0
        roles = [message.get("role") for message in messages[start:]]
        if len(roles) < 2 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            return None
        forms = tuple(_form(message) for message in messages)
        turns, end = [], 0
        for index in range(start + 1, len(messages), 2):
            begins = 0 if index == start + 1 else index - 1
            pair = self._pair(forms[: start + 2], forms[begins : index + 1] if begins else (), render)
            texts = [text for message in messages[begins : index + 1] for text in message_texts(message)]
            asked = len(texts) - len(message_texts(messages[index]))
            if pair is None or (len(pair[0]), len(pair[1])) != (asked + 1, len(texts) + 1):
                return None
            prompt, turn = _filled(pair[0], texts), _filled(pair[1], texts)
            if not turn.startswith(prompt) or not text.startswith(turn, end):
                return None
            turns.append((messages[index], text[: end + len(prompt)], text[: end + len(turn)]))
            end += len(turn)
        if forms not in self._proven:
            last = start + 2 * len(turns) - 1
            if render(messages[:last], True) != turns[-1][1]:
                return None
            if len(self._proven) >= _MOST_CACHED_FORMS:
                self._proven.clear()
            self._proven.add(forms)
        return turns

    def _pair(self, first: tuple[Form, ...], pair: tuple[Form, ...], render: Render) -> Pieces | None:
        """What a pair, or the first one if `pair` is empty, adds to the prompt and to the text, cut where its texts
        stand; None if it changes what stands before it."""
        key = (first, pair)
        if key not in self._pairs:
            if len(self._pairs) >= _MOST_CACHED_FORMS:
                self._pairs.clear()
            messages = [_slotted(form) for form in (*first, *pair)]
            before = render([_slotted(form) for form in first], False) if pair else ""
            prompt, turn = render(messages[:-1], True), render(messages, False)
            kept = prompt.startswith(before) and turn.startswith(before)
            added = [rendered[len(before) :].split(_SLOT) for rendered in (prompt, turn)]
            self._pairs[key] = (added[0], added[1]) if kept else None
        return self._pairs[key]

    # --- ids ------------------------------------------------------------------------------------------------------

    def _cut(self, text: str, finder: re.Pattern[str]) -> Iterator[tuple[str, str | None]]:
        """The text between control tokens, and the tokens; some of these take in the space beside them."""
        position, behind = 0, False
        for found in finder.finditer(text):
            token = self._controls[found.group()][1]
            piece = text[position : found.start()].lstrip() if behind else text[position : found.start()]
            yield piece.rstrip() if token.lstrip else piece, None
            yield found.group(), found.group()
            position, behind = found.end(), token.rstrip
        yield text[position:].lstrip() if behind else text[position:], None

    def _ids(self, piece: str, control: str | None, mark: str, fresh: bool) -> tuple[list[int], bool]:
        """The ids of a text or, if `control` is given, of that token; and whether a text behind it starts afresh."""
        if control is None:
            return (self._text_ids(piece, mark, fresh), False) if piece else ([], fresh)
        number = self._controls[control][0]
        if control not in self._fresh_behind:
            behind = self.tokenizer(f"{control}a", add_special_tokens=False)["input_ids"][1:]
            self._fresh_behind[control] = behind == self._plain_ids("a", True)
        return [number], self._fresh_behind[control]

    def _begin_ids(self, text: str) -> list[int]:
        """The beginning token if the tokenizer adds it, unless the template has written it."""
        if self.tokenizer.bos_token_id is None or text.startswith(self.tokenizer.bos_token):
            return []
        added = self.tokenizer("")["input_ids"][:1]
        return list(added) if added == [self.tokenizer.bos_token_id] else []

    def _text_ids(self, marked: str, mark: str, fresh: bool) -> list[int]:
        key = (marked, mark, fresh)
        if key not in self._texts:
            if len(self._texts) >= _MOST_CACHED_TEXTS:
                self._texts.clear()
            self._texts[key] = self._safe_ids(marked, mark, fresh)
        return self._texts[key]

    def _safe_ids(self, marked: str, mark: str, fresh: bool) -> list[int]:
        """Ids of text as text. What a tokenizer reads as a control token all the same is encoded in two parts."""
        ids = self._plain_ids(marked.replace(mark, ""), fresh)
        if self._control_ids.isdisjoint(ids):
            return ids
        ids = []
        for number, part in enumerate(marked.split(mark)):
            ids += self._plain_ids(part, fresh and number == 0)
        found = self._control_ids.intersection(ids)
        if found:
            names = ", ".join(repr(token) for token, (number, _) in self._controls.items() if number in found)
            raise ChatError(f"the tokenizer reads {names} in the plain text {marked.replace(mark, '')[:80]!r}")
        return ids

    def _plain_ids(self, text: str, fresh: bool) -> list[int]:
        """Ids of text at the beginning (`fresh`), where some tokenizers put a space before it, or in the middle."""
        if not text:
            return []
        if not fresh and self._adds_space:
            return self._inside_ids(text)
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _inside_ids(self, text: str) -> list[int]:
        """Ids of text behind other text. Where ids end with the anchor's, nothing of it has merged with the text."""
        for anchor in _ANCHORS:
            before, ids = self._plain_ids(anchor, True), self._plain_ids(anchor + text, True)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        raise ChatError(f"the tokenizer cannot encode {text[:80]!r} apart from what stands before it")


def message_texts(message: Message) -> list[str]:
    """The texts of a message, whose content is a text or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or [] if isinstance(part.get("text"), str)]


def _form(message: Message) -> Form:
    content = message.get("content")
    return message["role"], None if isinstance(content, str) else tuple(part.get("type") for part in content or [])


def _slotted(form: Form) -> Message:
    role, kinds = form
    if kinds is None:
        return {"role": role, "content": _SLOT}
    return {"role": role, "content": [{"type": kind} | ({"text": _SLOT} if kind == "text" else {}) for kind in kinds]}


def _filled(pieces: list[str], texts: Sequence[str]) -> str:
    """The pieces with the texts between them."""
    return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=False))


def _turns(messages: list[Message], text: str, render: Render, add_generation_prompt: bool) -> list[Turn]:
    """Prompt and turn of each answer, by rendering both; the time grows with the square of their number."""
    turns = []
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = render(messages[:index], True) if index else ""
            last = index + 1 == len(messages) and not add_generation_prompt
            turns.append((message, prompt, text if last else render(messages[: index + 1], False)))
    return turns


def _answer(message: Message, texts: tuple[str, str, str], finder: re.Pattern[str]) -> tuple[int, int, str | None]:
    """Where an answer begins and ends, and the control token it ends with.

    Args:
        message: the answer.
        texts: the prompt of inference that leads to it, the text up to and with its turn, and the whole text.
    """
    prompt, turn, text = texts
    if not prompt:
        raise ChatError("the conversation begins with an answer; put its question before it")
    if not text.startswith(turn) or not turn.startswith(prompt):
        raise ChatError(
            "the chat template writes an answer otherwise than its prompt at inference leads to (parts for thinking "
            "are a usual reason); take another template, for example chatml"
        )
    begin = len(prompt)
    found = finder.search(turn, begin)
    body = turn[begin : found.start()] if found else turn[begin:]
    position = 0
    for said in message_texts(message):
        position = body.find(said.strip(), position)
        if position < 0:
            raise ChatError(
                f"the chat template does not write the answer {said[:80]!r} between its prompt, which ends with "
                f"{prompt[-20:]!r}, and the end of the turn; it must write answers whole and honour "
                "add_generation_prompt"
            )
    return begin, found.end() if found else len(turn), found.group() if found else None


def _stretches(spans: Sequence[tuple[int, int]], length: int) -> Iterator[tuple[int, int, bool]]:
    """Begin, end and whether it is an answer, of the stretches that make up the whole text."""
    position = 0
    for begin, end in spans:
        yield position, begin, False
        yield begin, end, True
        position = end
    yield position, length, False


def _alternatives(texts: Any) -> str:
    """A pattern for any of the texts, longer ones first; for none of them, one that finds nothing."""
    return "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text))) or "(?!)"


@lru_cache(maxsize=64)
def _finder(pattern: str, mark: str) -> re.Pattern[str]:
    """Finds control tokens that the template wrote: a mark stands within those of a message, or behind a short one."""
    return re.compile(f"(?:{pattern})(?!{re.escape(mark)})")
