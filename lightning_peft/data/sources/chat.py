"""From a conversation to token ids: the chat template renders it, and what must be learned is marked exactly.

A template need not say where a completion begins. But it renders the conversation up to a completion, with the prompt
for one (``add_generation_prompt``), which is what the model reads when it generates, and the conversation with the
completion. What the second has more than the first is what the model must write. So each completion is marked exactly
for any template whose second text begins with the first; another is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lightning_peft.data.sources.conversations import Conversation, Turn
from lightning_peft.data.sources.records import BadRowError
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer without a template: each turn as it is, on a line of its own, completions ended by the end token.
PLAIN_TEMPLATE = (
    "{% if begins %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first and loop.previtem['role'] != 'assistant' %}{{ joint }}{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ joint }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a text; ``learned`` is True if the model must learn to write it."""

    text: str
    learned: bool


class Chat:
    """A tokenizer with the template that it, or the user, or nobody brought.

    Args:
        tokenizer: The tokenizer.
        template: A Jinja template in place of the tokenizer's, ``"plain"`` for :data:`PLAIN_TEMPLATE`, or None.

    Raises:
        ConfigError: If there is no end token where the template needs one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):  # several by name
            own = own.get("default")
        self.is_plain = template == "plain" or (template is None and own is None)
        self.template = PLAIN_TEMPLATE if self.is_plain else str(template or own)
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token): a model could not learn "
                "where a completion ends. Give the tokenizer one."
            )
        # Only where the tokenizer begins every text so: a model that was trained without would not know it.
        ids = tokenizer("a")["input_ids"]
        self.begins = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.ends = tuple({*special, *tokenizer.all_special_tokens})

    @property
    def settings(self) -> tuple[str, ...]:
        """All that the output depends on, besides what :func:`~.tokenizing.digest` covers."""
        tokenizer = self.tokenizer
        return self.template, str(tokenizer.bos_token), str(tokenizer.eos_token), *sorted(self.ends)

    def render(self, turns: Sequence[Turn], prompt: bool, begins: bool = True, joint: str = "\n") -> str:
        """Return the text of the turns; with ``prompt``, up to where a completion begins.

        Raises:
            BadRowError: If the template refuses the conversation.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        options: dict[str, Any] = {"begins": begins and self.begins, "joint": joint} if self.is_plain else {}
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt, **options
            )
        except TemplateError as error:
            raise BadRowError("refused by the chat template", str(error)) from error

    def segment(self, conversation: Conversation, learned: Sequence[int]) -> list[tuple[int, list[Segment]]]:
        """Return texts that between them teach each completion once, in what the model reads before it.

        One text serves all completions if the template renders a turn alike whatever follows. Some do not (Qwen3 leaves
        the thinking of earlier turns out): such a conversation becomes several texts.

        Args:
            conversation: The conversation.
            learned: Indices of the turns to learn, ascending.

        Returns:
            The index of the last turn of each text, and its segments.

        Raises:
            BadRowError: If the template does not begin a completion with its own prompt for one.
        """
        joint = "" if conversation.verbatim else "\n"
        texts: list[tuple[int, list[Segment]]] = []
        done = after = ""
        for turn in learned:
            before = self.render(conversation.turns[:turn], prompt=True, joint=joint)
            if texts and before.startswith(after):
                segments = texts.pop()[1]
            else:
                done, segments = "", []
            after = self.render(conversation.turns[: turn + 1], prompt=False, joint=joint)
            answer = after[len(before) :]
            if not after.startswith(before) or not answer.strip():
                raise BadRowError(
                    "refused: the chat template does not begin a completion with its own generation prompt",
                    f"{after[-40:]!r} after {before[-40:]!r}; give another chat_template",
                )
            if answer.rstrip().endswith(self.ends):  # the line break behind it belongs to the template
                answer = answer.rstrip()
            segments += [Segment(text=before[len(done) :], learned=False), Segment(text=answer, learned=True)]
            texts.append((turn, segments))
            done = before + answer
        return [(turn, self._ended(segments)) for turn, segments in texts]

    def render_prompt(self, conversation: Conversation, turn: int, encoder: bool = False) -> str:
        """Return the text up to turn ``turn``, as the model reads it before it generates that turn.

        Args:
            conversation: The conversation.
            turn: Index of the completion.
            encoder: True if an encoder reads it: the plain template then adds nothing at its ends.

        Raises:
            BadRowError: If the template refuses the conversation.
        """
        bare = encoder and self.is_plain
        joint = "" if conversation.verbatim else "\n"
        return self.render(conversation.turns[:turn], prompt=not bare, begins=not bare, joint=joint)

    def _ended(self, segments: list[Segment]) -> list[Segment]:
        """Let the last completion end with a token that ends it."""
        answer = segments[-1].text
        if answer.endswith(self.ends):
            return segments
        return [*segments[:-1], Segment(text=answer + str(self.tokenizer.eos_token), learned=True)]


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[list[Segment]]) -> list[list[tuple[list[int], bool]]]:
    """Return the token ids of each text's segments.

    The ids up to any border are the ids of the text up to there, which the model reads before it generates. Where
    a token would reach over the border in the longer text, the next segment is therefore encoded by itself.
    """
    beginnings = [list(accumulate(segment.text for segment in segments)) for segments in texts]
    # In one call, which fast tokenizers spread over the cores.
    encoded = iter(_ids(tokenizer, [text for grown in beginnings for text in grown]))
    rows = []
    for segments in texts:
        done: list[int] = []
        row = []
        for segment in segments:
            whole = next(encoded)
            joins = whole[: len(done)] == done
            ids = whole[len(done) :] if joins else _ids(tokenizer, [segment.text])[0]
            row.append((ids, segment.learned))
            done = done + ids
        rows.append(row)
    return rows


def encode_pairs(chat: Chat, texts: Sequence[list[Segment]]) -> list[list[tuple[list[int], bool]]]:
    """Return the token ids of prompts for an encoder and, where there is one, of the completion that a decoder learns.

    The tokenizer puts its special tokens around a text, but for a prompt in which the chat template has put them.
    """
    tokenizer = chat.tokenizer
    rows = []
    for prompt, *completion in texts:
        source = tokenizer(prompt.text, add_special_tokens=chat.is_plain, verbose=False)["input_ids"]
        row = [(source, False)]
        for segment in completion:
            target = tokenizer(text_target=segment.text, verbose=False)["input_ids"]
            row.append((target if target[-1] == tokenizer.eos_token_id else [*target, tokenizer.eos_token_id], True))
        rows.append(row)
    return rows


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # A template, unlike a text, has its special tokens in it.
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
