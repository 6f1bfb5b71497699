"""From rows of all layouts to conversations, and which rows are bad."""

import pytest

from lightning_peft.data.sources.conversations import read_conversation
from lightning_peft.data.sources.records import BadRowError

HI, ONE, AND, TWO = "Hi", "one", "And?", "two"


def messages(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]


def shared(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(turns)]


@pytest.mark.parametrize(
    ("row", "spoken"),
    [
        ({"messages": messages(HI, ONE, AND, TWO)}, [HI, ONE, AND, TWO]),
        ({"conversations": shared(HI, ONE, AND, TWO), "messages": None}, [HI, ONE, AND, TWO]),
        ({"conversations": [{"from": "system", "value": "S"}, *shared(HI, ONE)]}, ["S", HI, ONE]),
        ({"conversations": shared(HI, ONE), "system": "S"}, ["S", HI, ONE]),
        ({"prompt": HI, "completion": ONE, "score": 3}, [HI, ONE]),
        (
            {"prompt": messages(HI, ONE, AND), "completion": [{"role": "assistant", "content": TWO}]},
            [HI, ONE, AND, TWO],
        ),
        ({"instruction": HI, "input": "", "output": ONE}, [HI, ONE]),
        ({"instruction": HI, "input": None, "output": ONE}, [HI, ONE]),
        ({"instruction": HI, "input": "x", "output": ONE}, ["Hi\n\nx", ONE]),
        # As Arrow has it: every row has all columns, every message all keys.
        (
            {"prompt": None, "messages": [m | {"name": None, "from": None} for m in messages(HI, ONE)]},
            [HI, ONE],
        ),
    ],
)
def test_layouts_are_recognised(row, spoken):
    conversation = read_conversation(row)
    assert [turn.content for turn in conversation.turns] == spoken
    roles = [turn.role for turn in conversation.turns]
    assert roles == [*["system"] * (len(spoken) % 2), *["user", "assistant"] * (len(spoken) // 2)]


def test_the_answers_in_a_given_prompt_are_no_completions():
    row = {"prompt": messages(HI, ONE, AND), "completion": messages("", TWO)[1:]}
    assert read_conversation(row).completions == [3]
    assert read_conversation(row, system_prompt="S").completions == [4]
    assert read_conversation({"messages": messages(HI, ONE, AND, TWO)}).completions == [1, 3]


def test_only_a_prompt_and_a_completion_that_are_texts_join_as_they_are():
    assert read_conversation({"prompt": HI, "completion": ONE}).verbatim
    assert not read_conversation({"prompt": messages(HI), "completion": ONE}).verbatim
    assert not read_conversation({"instruction": HI, "output": ONE}).verbatim


def test_a_system_prompt_is_for_rows_without():
    assert read_conversation({"prompt": HI, "completion": ONE}, system_prompt="S").turns[0].content == "S"
    row = {"messages": [{"role": "system", "content": "own"}, *messages(HI, ONE)]}
    assert [turn.content for turn in read_conversation(row, system_prompt="S").turns] == ["own", HI, ONE]


def test_other_columns_and_a_given_layout():
    row = {"question": HI, "answer": ONE, "messages": messages(AND, TWO)}
    assert read_conversation(row).turns[0].content == AND
    turns = read_conversation(row, "prompt-completion", "question", "answer").turns
    assert [turn.content for turn in turns] == [HI, ONE]


def test_a_row_to_predict_needs_no_completion():
    for row in ({"prompt": HI}, {"prompt": HI, "completion": ""}, {"messages": messages(HI)}, {"instruction": HI}):
        assert [turn.content for turn in read_conversation(row, answered=False).turns] == [HI]
        with pytest.raises(BadRowError, match="no completion"):
            read_conversation(row)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"prompt": HI, "completion": " \n"}, "no completion", "'completion'"),
        ({"prompt": HI, "completion": 4}, "not text", "'completion' is a number"),
        ({"prompt": ["x"], "completion": ONE}, "not a list of messages", "'prompt'"),
        ({"prompt": {"a": 1}, "completion": ONE}, "not text", "'prompt' is an object"),
        ({"prompt": " ", "completion": ONE}, "no prompt", "'prompt'"),
        ({"instruction": None, "output": ONE}, "no prompt", "'instruction'"),
        ({"instruction": HI, "input": 3, "output": ONE}, "not text", "'input' is a number"),
        ({"messages": messages(HI, "")}, "no completion", "messages[1]"),
        ({"messages": messages(HI, ONE, AND)}, "no completion", "user's"),
        ({"messages": messages(HI, ONE)[::-1]}, "in wrong role order", "assistant, user"),
        ({"messages": messages(HI, ONE) + messages(HI, ONE)[1:]}, "in wrong role order", "user, assistant, assistant"),
        ({"messages": [*messages(HI, ONE), {"role": "system", "content": "S"}]}, "in wrong role order", "system"),
        ({"messages": [{"role": "tool", "content": HI}]}, "of an unknown role", "'tool'"),
        ({"messages": [{"role": ["user"], "content": HI}]}, "of an unknown role", "user"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "not text", "messages[0]"),
        ({"messages": []}, "no prompt", "empty"),
        ({"messages": "Hi"}, "not a list of messages", "'messages'"),
        ({"messages": [{"role": "system", "content": "S"}]}, "no prompt", "system"),
        ({"conversations": ["Hi"]}, "not a list of messages", "'conversations'"),
        ({"question": HI, "answer": ONE}, "of no known layout", "'question', 'answer'"),
        ({}, "of no known layout", "nothing"),
    ],
    ids=str,
)
def test_bad_rows(row, reason, detail):
    with pytest.raises(BadRowError) as caught:
        read_conversation(row)
    assert caught.value.reason == reason
    assert detail in str(caught.value)
