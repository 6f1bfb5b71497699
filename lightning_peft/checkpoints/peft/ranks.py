"""Methods with ranks: layers have ranks and alphas of their own, by patterns in the config."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints.peft.formats import PeftFormat, formats
from lightning_peft.checkpoints.peft.state import CONFIG, PeftFile, exact_names, exceptions
from lightning_peft.components.low_rank import LowRankMethod
from lightning_peft.components.ranked import RankedMethod
from lightning_peft.core.method import Method, Placement
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.errors import CheckpointError
from lightning_peft.network.patterns import pattern_value

_READ = ("rank_pattern", "alpha_pattern")
_INITS: tuple[Any, ...] = (None, True, False, "gaussian", "orthogonal", "eva")


@formats(RankedMethod)
class RankedFormat(PeftFormat):
    """The shapes of the tensors tell the ranks; alphas come from the method or the config."""

    def config(self, method: Any, placements: Sequence[Placement]) -> dict[str, Any]:
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for placement in placements:
            adapter: Any = placement.adapter
            ranks[placement.path] = r = adapter.rank
            # One of the fields, as it was written: what the scale was computed from cannot be had back exactly.
            known = {method.alpha, *method.alpha_pattern.values()}
            alphas[placement.path] = min(known, key=lambda alpha: abs(method.scaled(alpha, r) - adapter.scale))
        (r, rank_pattern), (alpha, alpha_pattern) = exceptions(ranks), exceptions(alphas)
        return {
            **super().config(method, placements),
            self.table.fields["r"]: r,
            self.table.fields["alpha"]: int(alpha) if alpha == int(alpha) else alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        table: PeftTable = self.table
        method: Any = self.method
        file.check_fields(*table.fields.values(), *_READ, *table.marks, *table.harmless)
        r, alpha = file.whole(table.fields["r"], 8), file.number(table.fields["alpha"], 8)
        rank_pattern, alpha_pattern = file.patterns("rank_pattern"), file.patterns("alpha_pattern")
        ranks = {path: tensor.shape[0] for path, tensor in file.hosts(*table.rank).items()}
        # The config's word is checked against the tensors, since peft would refuse such a file.
        for path, found in ranks.items():
            if found != pattern_value(rank_pattern, path, r):
                raise CheckpointError(
                    f"{CONFIG} gives '{path}' the rank {pattern_value(rank_pattern, path, r)}, and its tensors have "
                    f"{found}: r or rank_pattern was edited, or the files belong to two adapters."
                )
        (r, rank_pattern) = exceptions(ranks)
        (alpha, alpha_pattern) = exceptions({path: pattern_value(alpha_pattern, path, alpha) for path in ranks})
        patterns = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
        values = {**self.fields(file), "r": r, "alpha": alpha, **patterns}
        names = exact_names(ranks, file.model)
        return method(**values, target_modules=names, modules_to_save=None), file.tensors


@formats(LowRankMethod)
class LowRankFormat(RankedFormat):
    """LoRA and what peft has as a kind of it."""

    def config(self, method: Any, placements: Sequence[Placement]) -> dict[str, Any]:
        return {**super().config(method, placements), "bias": "none"}

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        for name, good in (("bias", ("none", None)), ("init_lora_weights", _INITS)):
            if name not in self.table.marks and file.config.get(name) not in good:
                raise file.unsupported(name)
        return super().from_peft(file)

    def fields(self, file: PeftFile) -> dict[str, Any]:
        return {
            **super().fields(file),
            "dropout": file.number("lora_dropout", 0.0),
            "use_rslora": file.flag("use_rslora"),
        }
