r"""Bottleneck adapters: two small linear layers and a non-linearity, in every block of a transformer or anywhere else.

.. math:: f(z) = s \cdot (W_{up}\, \sigma(W_{down} z + b) + b')

With h the output of a sublayer, x its residual input and LN its norm, the presets are

============== ================================ ============================ =====================================
preset         post-LN block (BERT)             pre-LN block (Llama)         paper
============== ================================ ============================ =====================================
houlsby        LN(h + f(h) + x)                 x + h + f(h)                 Houlsby et al., 2019, arXiv:1902.00751
pfeiffer       LN(h + f(z) + x), z = LN(h + x)  x + h + f(h + x)             Pfeiffer et al., 2021, arXiv:2005.00247
parallel       LN(h + f(x) + x)                 x + h + f(x)                 He et al., 2022, arXiv:2110.04366
adapter_plus   z + f(z), z = LN(h + x)          z + f(z), z = h + x          Steitz and Roth, 2024, arXiv:2406.06820
============== ================================ ============================ =====================================

h is taken before the block's own dropout.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from lightning_peft.components.bottleneck import NONLINEARITIES, Bottleneck
from lightning_peft.components.taps import Capture, Tap
from lightning_peft.core.adapter import InputAdapter, OutputAdapter, Reference
from lightning_peft.core.fields import Count, Must, Patterns, Probability, shown
from lightning_peft.core.method import Placement, Plan
from lightning_peft.core.targeted import TargetedMethod
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError, did_you_mean
from lightning_peft.network.calls import batch_dim, first_input, first_output, with_first_input, with_first_output
from lightning_peft.network.norms import Width, width_of
from lightning_peft.network.patterns import Vocabulary
from lightning_peft.network.sublayers import Sublayer, find_sublayers
from lightning_peft.network.targets import select_modules
from lightning_peft.network.walk import within

PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"after_attention": True},
    "pfeiffer": {"reads": "sum", "nonlinearity": "relu"},
    "parallel": {"reads": "input", "nonlinearity": "relu", "reduction_factor": 2.0, "scale": 4.0, "init": "mam"},
    "adapter_plus": {
        "reads": "sum",
        "residual": "after",
        "nonlinearity": "gelu",
        "reduction_factor": 96.0,
        "scale": "channel",
    },
}
_DEFAULTS = {
    "after_attention": False,
    "after_ffn": True,
    "reads": "output",
    "residual": "before",
    "reduction_factor": 16.0,
    "nonlinearity": "swish",
    "scale": 1.0,
    "init": "houlsby",
}
_Factor = Annotated[float, Must("a number other than 0", lambda x: x != 0 and math.isfinite(x))]


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(TargetedMethod):
    """Bottleneck adapters after the attention and feedforward parts of each block, or on any named module.

    A field that is None has the value of the preset.

    Raises:
        ConfigError: a field is out of range, there is no such preset, or the fields contradict each other.
        NotApplicableError: the model has no transformer blocks, or their norms cannot be told.
    """

    preset: str = "houlsby"
    """What fields left at None are: "houlsby", "pfeiffer", "parallel" or "adapter_plus"."""
    after_attention: bool | None = None
    """True if there is one at each self-attention."""
    after_ffn: bool | None = None
    """True if there is one at each feedforward part."""
    after_cross_attention: bool = False
    """True if there is one at each attention to another sequence."""
    reads: Literal["output", "sum", "input"] | None = None
    """What it reads: the sublayer's output h, the sum h + x (normed where the block is post-LN), or the input x."""
    residual: Literal["before", "after"] | None = None
    """Where it is added: before the residual sum (and its norm), or after; "after" needs reads="sum"."""
    reduction_factor: Annotated[float, Must("a number, at least 1", lambda x: 1 <= x < math.inf)] | None = None
    """Features of the residual stream over features of the bottleneck."""
    width: Count | None = None
    """Features of the bottleneck; takes the place of reduction_factor."""
    nonlinearity: str | None = None
    """One of relu, gelu, swish, silu, tanh, leaky_relu, identity."""
    scale: Literal["learned", "channel"] | _Factor | None = None
    """A fixed factor other than 0, or a learned one that starts at 1: one number, or one for each channel."""
    dropout: Probability = 0.0
    """Probability of dropping a feature of the bottleneck."""
    init: Literal["houlsby", "bert", "mam"] | None = None
    """Weights at the start: "houlsby" truncated normal 0.01, "bert" normal 0.02, "mam" up zero (exactly the base)."""
    layer_norm: Literal["before", "after"] | None = None
    """A LayerNorm of its own, before the bottleneck or after it; None for none."""
    gating: bool = False
    """True if a gate from the adapter's input, from 0 to 1, scales what it adds (UniPELT)."""
    target_modules: Patterns = None
    """None for the blocks of a transformer; else names of any modules: y + f(y), by a 1×1 convolution behind one."""

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise ConfigError(
                f"BottleneckAdapter has no preset {self.preset!r}; presets: {', '.join(PRESETS)}."
                f"{did_you_mean(str(self.preset), PRESETS)}"
            )
        super().__post_init__()
        # The values in force, the preset's among them: a field may be right alone and wrong beside the preset.
        if self.choice("nonlinearity") not in NONLINEARITIES:
            raise self.invalid("nonlinearity", f"one of {', '.join(map(repr, NONLINEARITIES))}")
        if self.choice("residual") == "after" and self.choice("reads") != "sum":
            raise self.invalid("residual", "'before' unless reads='sum': after the residual, the sum is what is there")
        if not any(self.choice(name) for name in ("after_attention", "after_ffn", "after_cross_attention")):
            raise ConfigError(
                "BottleneckAdapter: one of after_attention, after_ffn, after_cross_attention must be true."
            )

    def choice(self, name: str) -> Any:
        """The value of a field, the preset's where it is None."""
        value = getattr(self, name)
        return PRESETS[self.preset].get(name, _DEFAULTS.get(name)) if value is None else value

    @property
    def starts_as_base(self) -> bool:
        return bool(self.choice("init") == "mam")

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        if self.target_modules is not None:
            paths = select_modules(model, self.target_modules, self.exclude_modules, self.layers, fully_trained)
            return Plan([Placement(path, self._on(path, model.get_submodule(path))) for path in paths])
        kinds = {"attention": "after_attention", "cross-attention": "after_cross_attention", "ffn": "after_ffn"}
        every = [s for s in find_sublayers(model) if not within(s.output, fully_trained)]
        parts = {kind: {s.output for s in every if s.kind == kind} for kind in kinds}
        # What is asked for has to be there; a part that the model lacks is no matter unless it was asked for.
        wanted: set[str] = set()
        for kind, field in kinds.items():
            if self.choice(field) and not parts[kind]:
                raise NotApplicableError(
                    f"BottleneckAdapter({field}=True) finds no transformer blocks with such a part in "
                    f"{type(model).__name__}. Set {field}=False if they have others, or name the modules whose output "
                    "to adapt: target_modules=['layer1', 'layer2']."
                )
            wanted |= parts[kind] if self.choice(field) else set()
        roles = {"ffn": parts["ffn"], "attention": parts["attention"] | parts["cross-attention"]}
        roles |= {f"{role}-output": names for role, names in roles.items()}
        chosen = Vocabulary([s.output for s in every], roles).narrow(wanted, self.exclude_modules, self.layers)
        if not chosen:
            raise TargetError("BottleneckAdapter: exclude_modules and layers leave nothing to adapt.")
        return Plan([p for s in every if s.output in chosen for p in self._in_block(model, s)])

    def _on(self, path: str, module: nn.Module) -> OutputAdapter:
        width = width_of(module)
        if width is None:
            raise TargetError(
                f"BottleneckAdapter cannot tell how many features '{path}' ({type(module).__name__}) puts out: it has "
                "no linear, convolution, recurrent or norm layer. Name a layer inside it."
            )
        return BottleneckOutput(path, self._bottleneck(width, module), width)

    def _in_block(self, model: nn.Module, s: Sublayer) -> Iterator[Placement]:
        """The adapter of one sublayer, and what feeds it. Parts keep several on one host apart."""
        width, reads, part = Width(s.width, -1), self.choice("reads"), "" if s.kind == "ffn" else s.kind
        if reads != "output" and s.pre is None:
            raise NotApplicableError(
                f"BottleneckAdapter(reads={reads!r}) has to know where the norm of '{s.output}' is, and the block "
                f"'{s.block}' does not tell. Use preset='houlsby', or name modules in target_modules."
            )
        f = self._bottleneck(width, model.get_submodule(s.output), batch_dim(model.get_submodule(s.block)))
        # Four ways to the same formula, by where the block lets something be read and added.
        if reads == "output":
            yield Placement(s.output, BottleneckOutput(s.output, f, width), part)
        elif reads == "sum" and not s.pre:
            norm = model.get_submodule(s.norm)
            after = self.choice("residual") == "after"
            adapter = BottleneckOutput(s.norm, f, width) if after else BottleneckBeforeNorm(f, norm)
            yield Placement(s.norm, adapter, part)
        elif reads == "sum" and s.last:
            yield Placement(s.block, BottleneckOutput(s.block, f, width), part)
        else:
            tap = Tap()
            yield Placement(s.norm if s.pre and s.norm else s.source, Capture(tap), f"{part}x")
            yield Placement(s.output, BottleneckOutput(s.output, f, width, tap, reads == "sum"), part)

    def _bottleneck(self, width: Width, host: nn.Module, batch_dim: int = 0) -> Bottleneck:
        m = self.width or max(1, int(width.features // self.choice("reduction_factor")))
        return Bottleneck(self, width.features, m, next(host.parameters()), batch_dim)

    def invalid(self, name: str, words: str) -> ConfigError:
        return ConfigError(f"BottleneckAdapter.{name} must be {words}, not {shown(self.choice(name))}.")


class BottleneckOutput(OutputAdapter):
    """y + f(y); with a tap, y + f(x) or y + f(y + x) of the x that is in it."""

    def __init__(
        self, path: str, bottleneck: Bottleneck, width: Width, tap: Tap | None = None, adds_tap: bool = False
    ) -> None:
        super().__init__()
        self.path, self.bottleneck, self.width, self.tap, self.adds_tap = path, bottleneck, width, tap, adds_tap

    def forward(self, x: Any, y: Any) -> Any:
        h = first_output(y)
        if not isinstance(h, Tensor):
            raise TargetError(
                f"BottleneckAdapter on '{self.path}' met an output of type {type(h).__name__}, not a tensor. Name "
                "another module in target_modules, such as the last layer inside it."
            )
        z = h if self.tap is None else self.tap.take()
        if z is None or z.shape != h.shape:
            raise TargetError(
                f"BottleneckAdapter on '{self.path}' met an output of shape {tuple(h.shape)} and a stream of "
                f"{'unknown shape' if z is None else tuple(z.shape)}: the block rearranges it in between. "
                "Use reads='output' (preset='houlsby')."
            )
        # Told from the last layer inside the module, which need not be the last one that runs.
        dim = self.width.dim
        if z.dim() <= max(dim, 0) or z.shape[dim] != self.width.features:
            raise TargetError(
                f"BottleneckAdapter on '{self.path}' expected {self.width.features} features and met an output of "
                f"shape {tuple(h.shape)}. Name another module in target_modules, such as the last layer inside it."
            )
        z = z + h if self.adds_tap else z
        return with_first_output(y, h + self.bottleneck(z.movedim(dim, -1)).movedim(-1, dim).to(h.dtype))


class BottleneckBeforeNorm(InputAdapter):
    """LN(u + f(LN(u))) with u the residual sum: what the norm gets is changed, so its weights in force are used."""

    def __init__(self, bottleneck: Bottleneck, norm: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self._norm = Reference(norm)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        u = first_input(args, kwargs)
        return with_first_input(args, kwargs, u + self.bottleneck(self._norm.module.forward(u)).to(u.dtype))
