"""Real checkpoints to be damaged, and the four ways to load one, each with what has to be true afterwards."""

import io
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from project import Project, Steps, build_network
from snapshot import Snapshot
from tiny_models import bert
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft import BottleneckAdapter, Combine, LoRA, Method, PEFTCallback, PEFTModule, PrefixTuning
from lightning_peft.checkpoints.checksum import checksum
from lightning_peft.checkpoints.ckpt import adapter_keys
from lightning_peft.checkpoints.guard import check_bounds


class OwnModule(PEFTModule, Steps):
    """The same network on PEFTModule, with hyperparameters."""

    def __init__(self, lr: float = 1e-2, note: str = "") -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = build_network()


class Reader(PEFTModule):
    """A tiny BERT that classifies; its weights are the same each time."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr, warmup=0.1, schedule="linear")
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(4321)
            self.net = bert()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(input_ids=batch[0]).logits, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step


def vectors() -> DataLoader:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :8].argmax(-1)), batch_size=16)


def texts() -> DataLoader:
    ids = torch.randint(3, 40, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids, ids[:, 0] % 2), batch_size=4)


@dataclass
class Case:
    """A trained module, its checkpoint, and how to load what has become of that."""

    cls: type[L.LightningModule]
    method: Method
    folder: Path
    content: str = "adapter"
    data: Callable[[], DataLoader] = vectors

    def __post_init__(self) -> None:
        model, trainer = self.cls(), self._trainer()
        trainer.fit(model, self.data(), self.data())
        trainer.save_checkpoint(self.folder / "task.ckpt")
        self.bytes = (self.folder / "task.ckpt").read_bytes()
        self.trained, self.base = _tensors(model)
        self._model: Any = None

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.bytes), weights_only=True)

    @property
    def ways(self) -> dict[str, Callable[[Path], None]]:
        """How it can be loaded, by name."""
        own = {"PEFTModule.load_from_checkpoint": self._by_class} if issubclass(self.cls, PEFTModule) else {}
        function = {"load_from_checkpoint": self._by_function}
        return {**function, **own, "test": self._by_test, "fit": self._by_fit}

    @cached_property
    def loadable(self) -> Path:
        return self.folder / "damaged.ckpt"

    def _trainer(self, *callbacks: L.Callback, epochs: int = 1) -> L.Trainer:
        peft = PEFTCallback(self.method, show=False, checkpoint=self.content)
        return L.Trainer(
            callbacks=[peft, EarlyStopping("val_loss"), Timer(), *callbacks],
            num_sanity_val_steps=0,
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
        )

    def _by_function(self, path: Path) -> None:
        self._assert_original(lp.load_from_checkpoint(self.cls, path))

    def _by_class(self, path: Path) -> None:
        self._assert_original(self.cls.load_from_checkpoint(path))

    def _by_test(self, path: Path) -> None:
        self._unless_refused(lambda model: self._trainer().test(model, self.data(), ckpt_path=path, verbose=False))

    def _by_fit(self, path: Path) -> None:
        trainer = self._trainer(_AtStart(self._assert_original), epochs=2)
        self._unless_refused(lambda model: trainer.fit(model, self.data(), self.data(), ckpt_path=path))

    def _unless_refused(self, load: Callable[[L.LightningModule], object]) -> None:
        """``load`` into a model with an adapter of other values: the file's are in it afterwards, or nothing new is."""
        if self._model is None:
            self._model = self.cls()
            self._trainer(epochs=0).fit(self._model, self.data(), self.data())
        before = Snapshot(self._model)
        try:
            load(self._model)
        except lp.PEFTError:
            before.assert_same(self._model)
            self._model._trainer = None
            raise
        except BaseException:
            self._model = None
            raise
        else:
            model, self._model = self._model, None  # the next one gets a new one
            if model.trainer.state.fn == "test":
                self._assert_original(model)

    def _assert_original(self, model: L.LightningModule) -> None:
        adapter, base = _tensors(model)
        _assert_all_identical(adapter, self.trained)
        _assert_all_identical(base, self.base)


class _AtStart(L.Callback):
    def __init__(self, check: Callable[[L.LightningModule], None]) -> None:
        self.check = check

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(pl_module)


def resaved(checkpoint: dict[str, Any], path: Path, sum_is: str) -> None:
    """Write an edited checkpoint, its checksum left "stale", "deleted", or "made anew" as an attacker would."""
    record = checkpoint.get("lightning_peft")
    if isinstance(record, dict) and sum_is != "stale":
        record.pop("checksum", None)
        if sum_is == "made anew":
            with suppress(Exception):  # what cannot be summed goes without
                check_bounds(checkpoint)
                record["checksum"] = checksum(checkpoint)
    torch.save(checkpoint, path)


def peak_memory() -> int:
    """The most memory that this process has had at once, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def outcomes(case: Case, path: Path) -> Iterator[tuple[str, BaseException | None]]:
    """Load ``path`` in every way: (the way, what it ended in)."""
    for name, load in case.ways.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as by default: a warning must not be what stops a bad file
                load(path)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            yield name, error
        else:
            yield name, None


def cases(folder: Path) -> dict[str, Callable[[], Case]]:
    """The checkpoints to be damaged, made when they are asked for."""
    lora = LoRA(r=4, target_modules=["0", "3"], modules_to_save=["5"])
    both = Combine([LoRA(r=2, target_modules=["0"]), BottleneckAdapter(target_modules=["3"], width=4)])
    prefix = PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)

    def make(name: str, *args: Any) -> Callable[[], Case]:
        def build() -> Case:
            (folder / name).mkdir()
            return Case(args[0], args[1], folder / name, *args[2:])

        return build

    return {
        "lora": make("lora", Project, lora),
        "lora, full": make("full", Project, lora, "full"),
        "combine": make("combine", OwnModule, both),
        "lora, full, own": make("own", OwnModule, lora, "full"),
        "prefix": make("prefix", Reader, prefix, "adapter", texts),
    }


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the adapters' tensors, and of all others."""
    own, state = adapter_keys(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return {k: t for k, t in state.items() if k in own}, {k: t for k, t in state.items() if k not in own}


def _assert_all_identical(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
