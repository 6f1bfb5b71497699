"""The four kinds of adapter.

An adapter is a child of its host module and acts through the host's hooks and its attribute ``forward`` (see
:mod:`lightning_peft.injection.slots`), so the base keeps its class, its parameter names and its values. It may act for
several threads at once: what belongs to one call stays in local variables, or in a
:class:`~lightning_peft.components.taps.Tap`.

What an adapter is besides, it says by flags; few need one:

===================== ================================================================================================
set                   if
===================== ================================================================================================
additive              it adds something to the output that the other adapters of its host do not change
uses_base_weight      it computes with its host's weight, so that no other adapter may be merged into that before it
nesting               it has to act nearer to the host than other adapters (above 0), or farther (below 0)
needs_whole_sequences what it does to a token depends on where its row of the batch begins or ends
in_place              it has a forward_, and the host's output is its own (Host.owns_output)
saves_output          the backward of its forward_ reads the output
===================== ================================================================================================
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter_index import AdapterIndex
from lightning_peft.core.recipes import LowRank, Recipe
from lightning_peft.errors import AdapterNameError, NotApplicableError, NotMergeableError

M = TypeVar("M")


class Adapter(nn.Module):
    """Base of the four kinds. Floating-point parameters ignore casts to 16 bits: adapters train in full precision."""

    additive: bool = False
    """True if it adds something that does not depend on what other adapters of its host have made of the output."""
    uses_base_weight: bool = False
    """True if what it computes depends on its host's own weights, so that others cannot be folded into them."""
    nesting: int = 0
    """How near to the host it acts among several: the higher, the later before the host, and the sooner after it."""
    needs_whole_sequences: bool = False
    """True if what it does to one token depends on where a row of the batch begins or ends: a row must be one text.
    A module inside an adapter may say so, too."""
    trains: frozenset[str] = frozenset()
    """Names of the parameters that train, noted when the adapter is attached; the others stay as they were made."""

    def train_parameters(self, mode: bool = True) -> None:
        """Let the parameters of :attr:`trains` require a gradient, or not."""
        for name in self.trains:
            parameter = self._parameters.get(name)
            if parameter is None:
                parameter = self.get_parameter(name)  # of a module inside
            if parameter.requires_grad != mode:
                if not mode:
                    _guard(parameter)
                parameter.requires_grad_(mode)

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold this adapter into its host.

        Args:
            parameters: the host's own parameters by name, in at least fp32.

        Returns:
            The new values of the parameters that change, in the same shapes.

        Raises:
            NotMergeableError: what this adapter computes is not a change of the host's parameters.
        """
        raise NotMergeableError("what it computes is no change of its host's weights. Keep it as an adapter.")

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        """Take the values that ``recipe`` makes of ``sources``; this adapter is a copy of the first of them.

        Args:
            sources: adapters of this class on this host, with one weight each in the recipe.
            recipe: how to combine.
            parameters: the host's own parameters by name.

        Raises:
            NotApplicableError: what several of them compute does not add up.
        """
        raise NotApplicableError(
            "its parameters do not add up, being a network or tokens of their own. Let several act side by side "
            "(activate), or route rows of a batch to them (route)."
        )

    def low_rank(self) -> LowRank | None:
        """What it adds to its host's weight, where that is a product of two factors; None elsewhere."""
        return None

    def peft_tensors(self) -> Mapping[str, Tensor] | None:
        """The tensors by peft's keys and in its shapes, none where peft would compute something else.

        Returns:
            None where the method's table says it all (:class:`~lightning_peft.core.peft_table.PeftTable`).
        """
        return None

    def eject(self) -> bool:
        """Drop what only training needs, so that the same is computed with fewer parameters.

        Returns:
            Whether nothing is left, so that the adapter itself can go.
        """
        return False

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device, torch.float32) if narrowed else moved

        super()._apply(keep_precision, recurse)
        return self


def _guard(parameter: nn.Parameter) -> None:
    """Let a backward pass fail that has a gradient for ``parameter`` when it does not train any more."""
    if getattr(parameter, "_peft_guarded", False):
        return
    guarded = weakref.ref(parameter)

    def check(gradient: Tensor) -> None:
        own = guarded()
        if own is not None and not own.requires_grad:
            raise AdapterNameError(
                "A backward pass has a gradient for an adapter that does not train any more: other adapters were "
                "activated since its forward. Call backward before activate, or use the block: with active(model, "
                "name)."
            )

    parameter.register_hook(check)
    parameter._peft_guarded = True  # type: ignore[attr-defined]  # a copy has neither


class Reference(Generic[M]):
    """A module that an adapter uses and that is no child of it: it keeps its place, in the base or another adapter."""

    def __init__(self, module: M) -> None:
        self.module = module


BatchedForm = Callable[[Tensor, Tensor, AdapterIndex], Tensor]
"""``form(x, y, index) -> y'``: several adapters of one host at once, each on the rows that ``index`` gives it."""


class OutputAdapter(Adapter):
    """Acts after the host: ``forward(x, y) -> y'`` with the host's first input ``x`` and its output ``y``."""

    in_place: bool = False
    """True if it has a :meth:`forward_`, and neither the host nor its backward reads the output any more."""
    saves_output: bool = False
    """True if the backward of :meth:`forward_` reads the output, so that no other adapter may write into it."""

    def forward_(self, x: Any, y: Any) -> Any:
        """What ``forward`` computes, written into ``y``, which nothing else reads."""
        return self(x, y)

    @classmethod
    def batched(cls, adapters: Sequence[Any]) -> BatchedForm | None:
        """A faster form of ``adapters``, all of this class and on one host, than one after the other; None if none."""
        return None


class InputAdapter(Adapter):
    """Acts before the host: ``forward(args, kwargs) -> (args, kwargs)``."""


class Run:
    """The rest of one call of a host: the adapters around its forward that are still to act, and the forward itself."""

    def __init__(
        self, host: nn.Module, around: "Sequence[CallAdapter]", forward: Callable[..., Any], at: int = 0
    ) -> None:
        self.host, self.around, self.forward, self.at = host, around, forward, at

    @property
    def rest(self) -> "Sequence[CallAdapter]":
        """The adapters that are still to act."""
        return self.around[self.at :]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Go on with these arguments, and give the host's output."""
        if self.at == len(self.around):
            return self.forward(self.host, args, kwargs)
        return self.around[self.at](Run(self.host, self.around, self.forward, self.at + 1), args, kwargs)


class CallAdapter(Adapter):
    """Acts around the host's forward: ``forward(run, args, kwargs) -> output``, where ``run(args, kwargs)`` goes on.

    ``run.host`` is the host as this one call sees it, with the weights in force: what is set on it is gone afterwards.
    """


class WeightAdapter(Adapter):
    """Acts on what the host reads: ``forward(weight, name) -> weight'`` for each of :attr:`names`.

    For hosts that read a weight themselves (``nn.MultiheadAttention``), and for methods that live in weight space.
    """

    computed_when_read: bool = False
    """True if it is computed where the host reads it, for all adapters at once: ``forward(weight, name, acting)``."""
    names: tuple[str, ...]
    """Paths of the replaced parameters and buffers from the host, such as ``("out_proj.weight",)``."""

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self(parameters[name], name) for name in self.names}


def in_merge_order(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The order in which adapters of one host fold: the weights' own, what is behind the host, what is before it."""
    weights, calls, outputs, inputs = (
        [a for a in adapters if isinstance(a, kind)]
        for kind in (WeightAdapter, CallAdapter, OutputAdapter, InputAdapter)
    )
    return [*weights, *calls, *outputs, *reversed(inputs)]  # others act through these


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which an adapter beside ``weight`` trains: fp64 beside fp64, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
