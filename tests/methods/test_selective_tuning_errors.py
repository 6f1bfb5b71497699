"""What selective tuning refuses: fields, and choices that do not fit a model."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
from snapshot import Snapshot
from torch import nn

from lightning_peft import SelectiveTuning, inject
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError


def test_without_a_choice_it_is_an_error_when_it_is_planned_not_when_it_is_made() -> None:
    method = SelectiveTuning()
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(
        TargetError, match=r"nothing to choose by: set target_modules, .* or token_ids\. .*Callback\(None"
    ):
        inject(model, method)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (tiny_models.bert, {"target_modules": ".*"}),
        (tiny_models.bert, {"target_modules": ["bert"]}),
        (tiny_models.bert, {"parameter_types": ["weight", "bias", "norm", "embedding"]}),
        (tiny_models.llama, {"parameters": [".*"]}),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4), {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"layers": [0, 1]}),
    ],
)
def test_everything_is_no_selection(build: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(TargetError, match=r"would train every parameter of \w+: .* use PEFTCallback\(None\)"):
        inject(model, SelectiveTuning(**fields))
    before.assert_same(model)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["pooller"]}, TargetError, r"'pooller' matches no layer with parameters\. Did .* 'pooler'"),
        ({"target_modules": ["norms"]}, TargetError, r"Did you mean 'norm'"),
        (
            {"parameters": ["query.wieght"]},
            TargetError,
            r"no parameter is called 'query.wieght'\. Did you mean 'query\.weight'",
        ),
        ({"parameters": ["query.bias"], "parameter_types": ["weight"]}, TargetError, "nothing is left to train"),
        ({"exclude_modules": ["pooller"]}, TargetError, "exclude_modules: 'pooller' matches nothing"),
        ({"layers": [5]}, TargetError, "there is no layer 5"),
        ({"target_modules": ["query"], "parameter_types": ["norm"]}, NotApplicableError, "none has any norm"),
        ({"target_modules": ["classifier"]}, TargetError, "'classifier' is fully trained already"),
        ({"target_modules": ["norm"], "density": 0.5}, NotApplicableError, "none has any embedding or weight"),
        ({"token_ids": [40]}, ConfigError, r"no token 40 in 'bert.embeddings.word_embeddings', which has 40 rows"),
        ({"token_ids": [1], "exclude_modules": ["embedding"]}, TargetError, "is excluded, or fully trained"),
        ({"token_ids": [1], "modules_to_save": ["embeddings"]}, TargetError, "is excluded, or fully trained"),
        (
            {"token_ids": [1], "target_modules": r".*(position|type).*"},
            TargetError,
            "'bert.*': name one of them in tar",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_helps_and_changes_nothing(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, SelectiveTuning(**fields))
    before.assert_same(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": []}, "parameters must be a list of non-empty strings, or null"),
        ({"parameters": "query"}, "parameters must be a list"),
        ({"parameters": ["("]}, "parameters must be a list of suffixes or regular expressions"),
        (
            {"parameter_types": ["weights"]},
            "parameter_types: 'weights' is none of 'weight', 'bias', 'norm', 'embedding'",
        ),
        ({"parameter_types": "bias"}, "parameter_types must be a list"),
        ({"token_ids": []}, "token_ids must be a list of whole numbers from 0 on"),
        ({"token_ids": [-1]}, "token_ids must be"),
        ({"token_ids": [1.0]}, "token_ids must be"),
        ({"token_ids": [True]}, "token_ids must be"),
        ({"token_ids": 3}, "token_ids must be"),
        ({"token_ids": [4, 2, 4]}, "token_ids holds 4 more than once"),
        ({"density": 0}, "density must be a number greater than 0 and less than 1, or null, not 0"),
        ({"density": 1.0}, "density must be"),
        ({"density": float("nan")}, "density must be"),
        ({"density": "0.1"}, "density must be"),
        ({"density": True}, "density must be"),
        ({"density": 0.1, "score": "taylor"}, "score must be one of 'magnitude', 'fisher', not 'taylor'"),
        ({"score": "fisher"}, "score='fisher' picks entries: say how many with density"),
        ({"density": 0.1, "score": "fisher", "score_batches": 0}, "score_batches must be at least 1 and whole"),
        ({"score_batches": 2.0}, "score_batches must be"),
        ({"layers": "1"}, "layers must be"),
    ],
)
def test_a_field_out_of_range_is_an_error_that_shows_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"SelectiveTuning\.{message}"):
        SelectiveTuning(**fields)
