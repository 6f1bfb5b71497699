"""From conversations to token ids: what is learned, under each kind of chat template."""

import pytest
from chat_tokenizers import CHATML, CHATML_MARKED, TEMPLATES, byte_tokenizer

from lightning_peft.data.sources.chat import Chat, encode
from lightning_peft.data.sources.conversations import Conversation, Turn
from lightning_peft.data.sources.records import BadRowError
from lightning_peft.errors import ConfigError

SPOKEN = ("Hi ", " one", "And?", "two")


def conversation(*spoken: str, system: str | None = None, verbatim: bool = False) -> Conversation:
    turns = [Turn(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(spoken)]
    before = [] if system is None else [Turn(role="system", content=system)]
    return Conversation(turns=(*before, *turns), verbatim=verbatim)


def read(tokenizer, talk: Conversation, template: str | None = None) -> list[tuple[str, list[str]]]:
    """Each text that is made, and the pieces of it that are learned, as text again."""
    texts = Chat(tokenizer, template).segment(talk, talk.completions)
    rows = encode(tokenizer, [segments for _, segments in texts])
    return [
        (
            tokenizer.decode([token for ids, _ in row for token in ids]),
            [tokenizer.decode(ids) for ids, learned in row if learned],
        )
        for row in rows
    ]


def whole(tokenizer, talk: Conversation) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in talk.turns]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("chatml", [" one<|im_end|>", "two<|im_end|>"]),
        ("inst", ["  one </s>", " two </s>"]),
        ("model", ["one<|im_end|>", "two<|im_end|>"]),
        ("endless", ["  one\n", " two\n</s>"]),
    ],
)
def test_exactly_what_the_model_must_write_is_learned(name, learned):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    talk = conversation(*SPOKEN)
    ((text, found),) = read(tokenizer, talk)
    assert found == learned
    # Nothing is lost but the line break at the end, nothing is added but an end token where there is none.
    assert whole(tokenizer, talk).rstrip("\n") == text.removesuffix("\n</s>")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_learned_tokens_are_those_that_transformers_finds_in_a_marked_template(system):
    tokenizer, talk = byte_tokenizer(CHATML), conversation(*SPOKEN, system=system)
    ((_, segments),) = Chat(tokenizer).segment(talk, talk.completions)
    (row,) = encode(tokenizer, [segments])
    marked = byte_tokenizer(CHATML_MARKED).apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in talk.turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = [token for tokens, _ in row for token in tokens]
    assert ids == marked["input_ids"][:-1]  # a line break
    assert [int(learned) for tokens, learned in row for _ in tokens] == marked["assistant_masks"][:-1]


def test_where_earlier_turns_change_each_completion_has_a_text_of_its_own():
    tokenizer = byte_tokenizer(TEMPLATES["thinking"])
    think = "<think>\n\n</think>\n\n"
    (first, one), (second, two) = read(tokenizer, conversation(*SPOKEN))
    assert one == [f"{think} one<|im_end|>"]
    assert two == [f"{think}two<|im_end|>"]
    assert first == f"<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n{one[0]}"
    assert second == whole(tokenizer, conversation(*SPOKEN)).rstrip("\n")


def test_what_is_read_before_a_completion_is_what_is_read_to_generate_it():
    """A token may reach over the border in the whole text: here the two line breaks, and "ab"."""
    tokenizer = byte_tokenizer(CHATML)
    talk = conversation("x", "\nab", "y", "\n\nc")
    ((_, segments),) = Chat(tokenizer).segment(talk, talk.completions)
    (row,) = encode(tokenizer, [segments])
    for index in (1, 3):
        before = [token for ids, _ in row[:index] for token in ids]
        prompt = [{"role": turn.role, "content": turn.content} for turn in talk.turns[:index]]
        if index == 1:
            generating = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            assert before == generating["input_ids"]
        assert tokenizer.decode(row[index][0]) == f"{talk.turns[index].content}<|im_end|>"
    text = "".join(segment.text for segment in segments)
    assert tokenizer.decode([token for ids, _ in row for token in ids]) == text
    assert len([token for ids, _ in row for token in ids]) > len(tokenizer(text)["input_ids"])  # another division


@pytest.mark.parametrize(
    ("name", "talk", "message"),
    [
        ("other prompt", conversation("Hi", "one"), "generation prompt.*<think>"),
        ("model", conversation("Hi", "one", system="Be brief."), "no system turn"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(name, talk, message):
    with pytest.raises(BadRowError, match=message) as caught:
        read(byte_tokenizer(TEMPLATES[name]), talk)
    assert caught.value.reason.startswith("refused")


@pytest.mark.parametrize("bos", [False, True])
def test_the_plain_template(bos):
    tokenizer = byte_tokenizer(bos=bos)
    begin = "<s>" if bos else ""
    ((text, learned),) = read(tokenizer, conversation(*SPOKEN, system="Be brief."))
    assert text == f"{begin}Be brief.\nHi \n one</s>And?\ntwo</s>"
    assert learned == [" one</s>", "two</s>"]
    ((text, learned),) = read(tokenizer, conversation("2 + 2 =", " 4", verbatim=True))
    assert text == f"{begin}2 + 2 = 4</s>"
    assert learned == [" 4</s>"]
    ids = encode(tokenizer, [Chat(tokenizer).segment(conversation("a", "b"), [1])[0][1]])[0][0][0]
    assert ids.count(tokenizer.bos_token_id) == bos


def test_a_template_of_the_users_own_and_none_at_all():
    tokenizer = byte_tokenizer(CHATML)
    ((text, _),) = read(tokenizer, conversation("Hi", "one"), template="plain")
    assert text == "Hi\none</s>"
    ((text, _),) = read(tokenizer, conversation("Hi", "one"), template=TEMPLATES["inst"])
    assert text == "<s>[INST] Hi [/INST] one </s>"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        Chat(tokenizer)
