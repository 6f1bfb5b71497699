r"""LoRA: low-rank adaptation. Hu et al., 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732.

.. math:: y = W x + s B A x, \qquad A \in R^{r \times in}, B \in R^{out \times r}, \qquad s = \alpha / r

with :math:`\alpha / \sqrt r` for rsLoRA. B starts at zero, so training starts from the base model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, BatchedForm, OutputAdapter, WeightAdapter, adapter_dtype
from lightning_peft.core.fused import plain_update, update_
from lightning_peft.core.gate import Gate
from lightning_peft.core.hosts import ConvLayout, EmbeddingLayout, Host, Layout, TransposedLayout
from lightning_peft.core.method import LayerMethod, Placement, is_number
from lightning_peft.core.peft_form import CONFIG, PeftFile, PeftForm, PeftTensor, exact_names, exact_targets, exceptions
from lightning_peft.core.recipes import LowRank, Recipe
from lightning_peft.core.rows import Places
from lightning_peft.core.targets import matches_end, pattern_value
from lightning_peft.errors import CheckpointError, ConfigError, NotApplicableError, TargetError

_LONG = 16  # places of a row from which on its own factors are faster than a mask on those of all


@dataclass(frozen=True, kw_only=True)
class LoRA(LayerMethod):
    """Low-rank adaptation of linear, convolution, embedding and attention layers.

    Raises:
        ConfigError: a field is out of range, or a rank is larger than a layer chosen by name.
    """

    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)

    r: int = 8
    """Rank of the update, at least 1 and at most the smaller side of each layer's matrix."""
    alpha: float = 16.0
    """Numerator of the scale, greater than 0."""
    dropout: float = 0.0
    """Probability of dropping an input feature of A, 0 to 1 (exclusive). Embeddings, fed with indices, are exempt."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""
    gating: bool = False
    """Whether a gate from the layer's input (batch, length, features), from 0 to 1, scales the update (UniPELT). Then
    it cannot be merged."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of layers whose name ends in the key (a suffix or a regular expression)."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of layers whose name ends in the key (a suffix or a regular expression)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise self.invalid(name, "a mapping from layer names to values")
        for name, ranks in {"r": {"": self.r}, "rank_pattern": self.rank_pattern}.items():
            if not all(type(r) is int and r >= 1 for r in ranks.values()):
                raise self.invalid(name, "at least 1 and whole")
        for name, alphas in {"alpha": {"": self.alpha}, "alpha_pattern": self.alpha_pattern}.items():
            if not all(is_number(alpha) and 0 < alpha < math.inf for alpha in alphas.values()):
                raise self.invalid(name, "a number greater than 0")
        self.check_probability("dropout")
        self.check_flags("use_rslora", "gating")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise self.invalid(name, f"keyed by suffixes or regular expressions ({error})") from error

    def select(self, model: nn.Module, saved: Sequence[str]) -> list[Host]:
        hosts = super().select(model, saved)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(matches_end(pattern, host.name) for host in hosts):
                    raise TargetError(
                        f"LoRA.{name}: {pattern!r} matches none of the {len(hosts)} adapted layers, such as "
                        f"'{hosts[0].name}'."
                    )
        return hosts

    def combined(self, adapters: Mapping[str, Adapter]) -> "LoRA":
        ranks = {name: len(factors.a) for name, adapter in adapters.items() if (factors := adapter.low_rank())}
        r = max(ranks.values())
        others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
        # Alpha is r, so that the scale is one: the weights and scales of the adapters went into the factors.
        alphas = {name: float(rank) for name, rank in others.items()}
        return replace(self, r=r, alpha=float(r), use_rslora=False, rank_pattern=others, alpha_pattern=alphas)

    def build(self, host: Host) -> Adapter:
        r = pattern_value(self.rank_pattern, host.name, self.r)
        alpha = pattern_value(self.alpha_pattern, host.name, self.alpha)
        limit = min(host.layout.out_features, host.layout.in_features)
        if r > limit:
            raise ConfigError(
                f"rank {r} is larger than '{host.name}' ({host.layout.out_features} x {host.layout.in_features}) "
                f"allows; use r <= {limit} (rank_pattern), exclude_modules, or train it whole with modules_to_save."
            )
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        if self.gating and (host.reads_weight or not host.linear):
            raise NotApplicableError(
                f"LoRA.gating cannot act on '{host.name}' ({type(host.module).__name__}): a gate reads the features "
                "that enter a linear layer. Set gating=False or exclude it (exclude_modules)."
            )
        if not host.reads_weight:
            return LoRAOutput(host, r, scale, self.dropout, self.gating)
        if self.dropout:
            raise NotApplicableError(
                f"LoRA.dropout={self.dropout} cannot act on '{host.name}': {type(host.module).__name__} reads that "
                "weight itself, so there is no input to drop from. Set dropout=0 or exclude it (exclude_modules)."
            )
        return LoRAWeight(host, r, scale)

    def to_peft(self, placements: Sequence[Placement], model: nn.Module) -> PeftForm | None:
        tensors: dict[str, PeftTensor] = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        transposed = []
        for placement in placements:
            path, adapter = placement.path, placement.adapter
            if not isinstance(adapter, LoRAOutput) or not (named := adapter.peft_tensors()):
                return None  # peft has it in no layer that reads its weight itself (but for a part of one), and no gate
            tensors |= {f"{path}.{key}": PeftTensor((tensor,)) for key, tensor in named.items()}
            ranks[path] = r = adapter.lora_A.shape[0]
            divisor = math.sqrt(r) if self.use_rslora else r
            # One of the fields, as it was written: what the scale was computed from cannot be had back exactly.
            known = {self.alpha, *self.alpha_pattern.values()}
            alphas[path] = min(known, key=lambda alpha: abs(alpha / divisor - adapter.scale))
            transposed.append(type(adapter.layout) is TransposedLayout)
        (r, rank_pattern), (alpha, alpha_pattern) = exceptions(ranks), exceptions(alphas)
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "bias": "none",
            "fan_in_fan_out": any(transposed),
            "target_modules": exact_targets(ranks, model),
        }
        return PeftForm(config=config, tensors=tensors)

    @classmethod
    def from_peft(cls, file: PeftFile) -> tuple["LoRA", Mapping[str, Tensor]]:
        file.check_fields(*_READ)
        for name, harmless in (("bias", ("none", None)), ("init_lora_weights", _INITS)):
            if file.config.get(name) not in harmless:
                raise file.unsupported(name)
        r, alpha = file.whole("r", 8), file.number("lora_alpha", 8)
        rank_pattern, alpha_pattern = file.patterns("rank_pattern"), file.patterns("alpha_pattern")
        ranks = {path: a.shape[0] for path, a in file.hosts("lora_A.weight", "lora_embedding_A").items()}
        for path, found in ranks.items():
            if found != pattern_value(rank_pattern, path, r):
                raise CheckpointError(
                    f"{CONFIG} gives '{path}' the rank {pattern_value(rank_pattern, path, r)}, and its tensors have "
                    f"{found}: r or rank_pattern was edited, or the files belong to two adapters."
                )
        (r, ranks), (alpha, alphas) = (
            exceptions(ranks),
            exceptions({path: pattern_value(alpha_pattern, path, alpha) for path in ranks}),
        )
        method = cls(
            r=r,
            alpha=alpha,
            dropout=file.number("lora_dropout", 0.0),
            use_rslora=file.flag("use_rslora"),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            target_modules=exact_names(file.hosts("lora_A.weight", "lora_embedding_A"), file.model),
            modules_to_save=None,
        )
        return method, file.tensors


class _Factors(Adapter):
    """The two factors, wherever they act."""

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__()
        self.gate: Gate | None = None
        self.layout, self.scale = host.layout, scale
        self.lora_A, self.lora_B = _factors(host, r)  # (r, in), (out, r)

    def low_rank(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scale)

    def combine(self, sources: Sequence["_Factors"], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        if any(source.gate is not None for source in sources):
            raise NotApplicableError("a gate scales it, which differs from input to input (gating).")
        made = recipe.mix_low_rank([source.low_rank() for source in sources])
        self.lora_A, self.lora_B, self.scale = nn.Parameter(made.a), nn.Parameter(made.b), made.scale


class LoRAOutput(_Factors, OutputAdapter):
    """Adds ``s * B A x`` to the host's output, times a gate if there is one."""

    additive = True

    def __init__(self, host: Host, r: int, scale: float, dropout: float, gating: bool) -> None:
        super().__init__(host, r, scale)
        self.dropout = dropout
        self.gate = Gate(host.layout.in_features, self.lora_A) if gating else None
        self.writes = host.fresh and not gating

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale if self.gate is None else self.scale * self.gate(x)
        return plain_update(self.layout, x, y, self.lora_A, self.lora_B, scale, self._dropout(x))

    def into(self, x: Tensor, y: Tensor) -> Tensor:
        return update_(self.layout, x, y, self.lora_A, self.lora_B, self.scale, self._dropout(x))

    def _dropout(self, x: Tensor) -> float:
        return self.dropout if self.training and x.is_floating_point() else 0.0

    @classmethod
    def batched(cls, adapters: Sequence["LoRAOutput"]) -> BatchedForm | None:
        alike = all(a.gate is None and a.dropout == adapters[0].dropout for a in adapters)
        linear = all(type(a.layout) in (Layout, TransposedLayout) for a in adapters)
        return _ByRow(adapters) if alike and linear else None

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.gate is not None:
            return super().merge(parameters)
        weight = parameters["weight"]
        return {"weight": weight + _delta(self, weight)}

    def peft_tensors(self) -> dict[str, Tensor]:
        """The factors by peft's names and in its shapes; empty where peft would compute something else."""
        layout, a, b = self.layout, self.lora_A.detach(), self.lora_B.detach()
        if isinstance(layout, EmbeddingLayout):
            return {"lora_embedding_A": a, "lora_embedding_B": b}
        if isinstance(layout, ConvLayout):
            # peft's factors have no dilation and no padding mode, and with groups the second one has groups as well.
            if layout.groups > 1 or set(layout.dilation) != {1} or layout.padding_mode != "zeros":
                return {}
            a, b = layout.native(a), b.view(*b.shape, *[1] * len(layout.kernel))
        return {} if self.gate else {"lora_A.weight": a, "lora_B.weight": b}


class LoRAWeight(_Factors, WeightAdapter):
    """Adds ``s * B A`` to a weight that its host reads itself."""

    additive = True

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__(host, r, scale)
        self.names = (host.parameter,)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return weight + _delta(self, weight)


class _ByRow:
    """Adds to each row what its adapter makes of it.

    Factors are gathered for each row, (rows, r, in), where a row is long enough to make up for it. Else all adapters
    see all rows, and a mask on the ranks, (rows, sum of r), leaves each row its own.
    """

    def __init__(self, adapters: Sequence[LoRAOutput]) -> None:
        self.adapters = adapters
        self.ranks = [adapter.lora_A.shape[0] for adapter in adapters]
        self.scales = [adapter.scale for adapter in adapters]

    def __call__(self, x: Tensor, y: Tensor, places: Places) -> Tensor:
        first = self.adapters[0]
        if first.dropout:
            x = F.dropout(x, first.dropout, first.training)
        return (self._gathered if x.dim() > 2 and x.shape[1:-1].numel() >= _LONG else self._masked)(x, y, places)

    def _gathered(self, x: Tensor, y: Tensor, places: Places) -> Tensor:
        rows, scales, most = places.index, self.scales, max(self.ranks)
        # Behind the last adapter stands one of zeros, for the rows that get none.
        a: list[Tensor] = [own.lora_A for own in self.adapters]
        b: list[Tensor] = [own.lora_B for own in self.adapters]
        if min(self.ranks) < most:
            a = [F.pad(factor, (0, 0, 0, most - factor.shape[0])) for factor in a]
            b = [F.pad(factor, (0, most - factor.shape[1])) for factor in b]
        a_rows = torch.stack([*a, torch.zeros_like(a[0])]).to(y.dtype).index_select(0, rows)  # (rows, r, in)
        b_rows = torch.stack([*b, torch.zeros_like(b[0])]).to(y.dtype).index_select(0, rows)  # (rows, out, r)
        scale = places.once(
            (*scales, y.dtype), lambda: y.new_tensor([*scales, 0.0]).index_select(0, rows)[:, None, None]
        )
        h = torch.bmm(x.flatten(1, -2), a_rows.mT) * scale
        flat = y.flatten(1, -2)
        # In place where nothing is recorded: y is the layer's own, fresh.
        add = flat.baddbmm if torch.is_grad_enabled() else flat.baddbmm_
        return add(h.to(y.dtype), b_rows.mT).view_as(y)

    def _masked(self, x: Tensor, y: Tensor, places: Places) -> Tensor:
        ranks, scales, rows = self.ranks, self.scales, places.index

        def mask() -> Tensor:
            owner = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], device=rows.device)
            scale = torch.tensor([s for s, r in zip(scales, ranks, strict=True) for _ in range(r)], device=rows.device)
            return ((rows[:, None] == owner) * scale).to(y.dtype)  # (rows, sum of r)

        own_ranks = places.once((*ranks, *scales, y.dtype), mask).view(len(rows), *[1] * (x.dim() - 2), -1)
        h = F.linear(x, torch.cat([own.lora_A for own in self.adapters]).to(y.dtype)) * own_ranks
        b = torch.cat([own.lora_B for own in self.adapters], 1).to(y.dtype)
        flat = y.flatten(0, -2)
        add = flat.addmm if torch.is_grad_enabled() else flat.addmm_
        return add(h.to(y.dtype).flatten(0, -2), b.T).view_as(y)


# What from_peft reads, and what only says how the factors started (those that change the base when they start do not).
_READ = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config",
)  # fmt: skip
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def _factors(host: Host, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = host.weight
    dtype = adapter_dtype(weight)
    a = nn.Parameter(torch.zeros(r, host.layout.in_features, device=weight.device, dtype=dtype))
    b = nn.Parameter(torch.zeros(host.layout.out_features, r, device=weight.device, dtype=dtype))
    if isinstance(host.layout, EmbeddingLayout):
        nn.init.normal_(b)  # a row of A belongs to one token: starting from zero, each moves when it is first seen
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, b


def _delta(adapter: LoRAOutput | LoRAWeight, weight: Tensor) -> Tensor:
    """``s * B A`` in the shape and dtype of ``weight``."""
    return adapter.layout.native(adapter.scale * (adapter.lora_B @ adapter.lora_A)).to(weight.dtype)
