r"""Selective tuning: chosen parameters of the base train, whole layers of it or single entries.

.. math:: W' = W \odot (1 - M) + V \odot M, \qquad V \text{ starts as } W

M is fixed by layer, kind and name (which layers suit which change of the data: Lee et al., 2022, arXiv:2210.11466), or
picks a share of each matrix's entries: the largest in magnitude, or those with the largest mean squared gradient (FISH
mask: Sung et al., 2021, arXiv:2111.09839).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.components.entries import TunedEntries, entries, tune
from lightning_peft.components.token_rows import find_table, tune_rows
from lightning_peft.components.tuned import trainable_copy
from lightning_peft.core.adapter import adapter_dtype
from lightning_peft.core.fields import Count, Must, Patterns
from lightning_peft.core.method import Placement, Plan
from lightning_peft.core.starting import starts
from lightning_peft.core.targeted import TargetedMethod
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError, did_you_mean
from lightning_peft.network.parameters import KINDS, BaseParameter, count, find_parameters, outside
from lightning_peft.network.targets import readers_of

_Names = Annotated[
    list[str] | None, Must("a list of non-empty strings, or null", lambda v: v is None or (len(v) > 0 and all(v)))
]
_Tokens = Annotated[
    list[int] | None,
    Must("a list of whole numbers from 0 on, or null", lambda v: v is None or (len(v) > 0 and min(v) >= 0)),
]
_Share = Annotated[
    float | None, Must("a number greater than 0 and less than 1, or null", lambda x: x is None or 0 < x < 1)
]


@dataclass(frozen=True, kw_only=True)
class SelectiveTuning(TargetedMethod):
    """Training of chosen parameters of the base; the fields narrow the choice together. Something must be chosen.

    Raises:
        ConfigError: a field is out of range, or a token is not in the table.
        NotApplicableError: there is no parameter of the chosen kind.
        TargetError: nothing is chosen, everything is, or a pattern matches nothing.
    """

    target_modules: Patterns = None
    """Layers whose parameters train: a list of names or suffixes (all below is meant too), roles and the words "norm"
    and "embedding", or one regular expression for whole names; None for all but the task head. Roles: attention,
    query, key, value, attention-output, ffn, ffn-output."""
    parameters: _Names = None
    """Names of the parameters that train: suffixes such as "query.weight", or regular expressions; None for all."""
    parameter_types: _Names = None
    """Kinds of parameters that train: "weight" (matrices and kernels), "bias" (of norms too), "norm" (weight and bias),
    "embedding" (tables); None for all."""
    token_ids: _Tokens = None
    """Tokens whose rows of the input embedding train: of a transformers model its own, else of the one that
    target_modules names, or the only one. Where the output layer is tied to it, the rows train there too. With no other
    field that chooses, these rows train alone."""
    density: _Share = None
    """Share of the entries that train, 0 to 1 (both exclusive), in each chosen matrix, kernel and table; None for all.
    Vectors then train only where parameters or parameter_types name them."""
    score: Literal["magnitude", "fisher"] = "magnitude"
    """What density picks by: "magnitude" (largest absolute value) or "fisher" (largest mean squared gradient)."""
    score_batches: Count = 8
    """Backward passes over which "fisher" takes the mean; these leave the parameters as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.parameters or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.invalid("parameters", f"a list of suffixes or regular expressions ({error})") from error
        for kind in self.parameter_types or []:
            if kind not in KINDS:
                raise ConfigError(
                    f"SelectiveTuning.parameter_types: {kind!r} is none of {', '.join(map(repr, KINDS))}."
                    f"{did_you_mean(kind, KINDS)}"
                )
        ids = self.token_ids or []
        # Each token has one row that trains; a second one would silently never be looked up.
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise ConfigError(f"SelectiveTuning.token_ids holds {twice[0]} more than once.")
        if self.score == "fisher" and self.density is None:
            raise ConfigError("SelectiveTuning.score='fisher' picks entries: say how many with density, such as 0.01.")

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        choosing = ["target_modules", "layers", "parameters", "parameter_types", "density"]
        if self.token_ids is None:  # of rows alone, exclude_modules says where they stay as they are
            choosing.append("exclude_modules")
        # Rows of tokens alone are a choice too, and then nothing else trains.
        chosen: list[BaseParameter] = []
        if any(getattr(self, name) is not None for name in choosing):
            kinds = self.parameter_types
            if self.density is not None and kinds is None and self.parameters is None:
                kinds = ["weight", "embedding"]
            chosen = self.select_parameters(model, fully_trained, kinds, self.parameters)
        elif self.token_ids is None:
            raise TargetError(
                f"SelectiveTuning has nothing to choose by: set {', '.join(choosing)} or token_ids. To train every "
                "parameter, that is full fine-tuning: PEFTCallback(None)."
            )
        rows: list[Placement] = []
        if self.token_ids is not None:
            table = find_table(model, chosen if self.target_modules is not None else [])
            places = readers_of(table.tensor, model, self.exclude_modules, fully_trained)
            if not places:
                raise TargetError(
                    f"SelectiveTuning.token_ids: '{table.path}' is excluded, or fully trained (modules_to_save)."
                )
            if (largest := max(self.token_ids)) >= len(table.tensor):
                raise ConfigError(
                    f"SelectiveTuning.token_ids: there is no token {largest} in '{table.path}', which has "
                    f"{len(table.tensor)} rows. Enlarge it first (resize_token_embeddings)."
                )
            rows = tune_rows(places, self.token_ids)
            # A table whose rows train is not trained whole beside them.
            chosen = [p for p in chosen if p.tensor is not table.tensor]
        matrices = {p for p in chosen if not p.kinds.isdisjoint(("weight", "embedding"))}
        sparse = [p for p in chosen if p in matrices and self.density is not None]
        whole = [p for p in chosen if p not in matrices or self.density is None]
        # Everything would be full fine-tuning, with a second copy of the model.
        if not rows and not sparse and count(whole) == count(outside(find_parameters(model), fully_trained)):
            raise TargetError(
                f"SelectiveTuning would train every parameter of {type(model).__name__}: choose fewer, or, for full "
                "fine-tuning, use PEFTCallback(None)."
            )
        return Plan([*rows, *self._pick(sparse), *tune(whole)])

    def _pick(self, chosen: Sequence[BaseParameter]) -> list[Placement]:
        """Adapters for the share ``density`` of each parameter's entries."""
        picked: dict[int, tuple[nn.Parameter, Tensor]] = {}
        placements: list[Placement] = []
        for p in chosen:
            k = max(1, round((self.density or 0) * p.tensor.numel()))
            # Its entries are found while it trains: until then each place has an adapter of its own.
            if self.score == "fisher":
                if other := next((q for q in chosen if q.tensor is p.tensor and q is not p), None):
                    raise NotApplicableError(
                        f"SelectiveTuning.score='fisher': '{p.full_name}' is tied to '{other.full_name}', so that its "
                        "gradient comes in parts. Leave one out (exclude_modules), or use score='magnitude'."
                    )
                adapter: TunedEntries = ScoredEntries(p, k, self.score_batches)
            else:
                if id(p.tensor) not in picked:
                    index = (
                        _largest(p.tensor.detach().abs(), k) if starts() else torch.arange(k, device=p.tensor.device)
                    )
                    picked[id(p.tensor)] = trainable_copy(entries(p.tensor, index), p.full_name), index
                adapter = TunedEntries(p.name, *picked[id(p.tensor)])
            placements.append(Placement(p.path, adapter, p.name.replace(".", "_")))
        return placements


class ScoredEntries(TunedEntries):
    """Entries with the largest mean squared gradient, which it finds out in its first backward passes.

    Until then the weight stays as it is, and ``values`` gets a gradient of zero. A layer that runs several times in one
    forward pass is scored as often.
    """

    score: Tensor | None

    def __init__(self, parameter: BaseParameter, k: int, batches: int) -> None:
        weight = parameter.tensor
        index = torch.arange(k, device=weight.device)
        super().__init__(parameter.name, trainable_copy(entries(weight, index), parameter.full_name), index)
        nn.init.zeros_(self.values)  # so that weight decay does not move them before they act
        self.batches = batches
        # Saved, so that a run that is resumed goes on where it was; the scores are not, being as large as the base.
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.register_buffer("score", None, persistent=False)
        self._scoring: bool | None = True  # None: ask ``seen``

    def forward(self, weight: Tensor, name: str) -> Tensor:
        if self._scoring is None:
            self._scoring = int(self.get_buffer("seen")) < self.batches
        if not self._scoring:
            return super().forward(weight, name)
        # In eval mode too: from_pretrained leaves a model in it, and a backward pass is a training step all the same.
        if not torch.is_grad_enabled():
            return weight
        # Not by a decorator, which would import torch's compiler with this module.
        output: Tensor = torch.compiler.disable(_Observed.apply)(weight, self.values, self)
        return output

    @torch.no_grad()
    def observe(self, weight: Tensor, gradient: Tensor) -> None:
        """Score one gradient of ``weight``; after the last one, pick the entries."""
        if not self._scoring:  # the layer ran several times in the last pass
            return
        square = gradient.to(adapter_dtype(gradient)).nan_to_num(0, 0, 0).square()  # fp16 may overflow while it scales
        self.score = square if self.score is None else self.score.add_(square)
        seen = self.get_buffer("seen").add_(1)
        if int(seen) < self.batches:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.score)  # every rank has to pick the same
        self.index.copy_(_largest(self.score, len(self.index)))
        self.values.copy_(entries(weight, self.index))
        self.score, self._scoring = None, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.score, self._scoring = None, None


class _Observed(torch.autograd.Function):
    """The weight itself. Its gradient is shown to the adapter, whose values get none of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, adapter: ScoredEntries) -> Tensor:
        ctx.adapter = adapter
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        ctx.adapter.observe(weight, gradient)
        return gradient if ctx.needs_input_grad[0] else None, torch.zeros_like(ctx.adapter.values), None


def _largest(score: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` largest entries, ascending."""
    return score.flatten().topk(k).indices.sort().values
