"""Samplers whose order is a pure function of (seed, epoch), so that a resumed run sees what a straight run sees.

Lightning calls ``set_epoch`` on a loader's ``sampler`` and on its ``batch_sampler.sampler`` before each epoch. Under a
distributed strategy it replaces the latter by a ``DistributedSampler`` (which has an ``epoch`` of its own) and builds
the batch sampler again with the arguments it was first built with. Both samplers here are made for exactly that.

Together with the loader here, which remembers how far it got, a run can be resumed in the middle of an epoch.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from lightning_peft.errors import ConfigError


def seeded_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator that depends on ``seed`` (its low 32 bits) and ``epoch`` alone.

    ``seed + epoch`` would make epoch 1 of seed 0 the same as epoch 0 of seed 1. Torch's CPU generator reads only the
    low 32 bits of its seed, so the two are mixed by a prime and not by a shift.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)


class EpochRandomSampler(RandomSampler):
    """A random permutation that depends on (seed, epoch) and not on torch's global random state.

    It is a ``RandomSampler`` because that is how Lightning knows that a loader shuffles, and so that the
    ``DistributedSampler`` it puts in place must shuffle too.

    Args:
        data_source: Anything with a length.
        seed: With the epoch, all that the order depends on.
    """

    def __init__(self, data_source: Sequence, seed: int = 0) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next ``iter``."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # A generator: `epoch` is read when the first index is asked for, not when the iterator is made.
        yield from torch.randperm(len(self), generator=seeded_generator(self.seed, self.epoch)).tolist()


class LengthBucketBatchSampler(BatchSampler):
    """Batches of rows of similar length, in random order: most of the padding goes, the randomness stays.

    It takes ``window`` batches' worth of rows from ``sampler`` at a time, sorts them by length, cuts them into batches
    and yields these in random order. Rows of equal length keep the sampler's random order. The rows of an incomplete
    last batch are set aside before the sorting, so that which rows these are (or, with ``drop_last``, which rows are
    lost) does not depend on their length.

    Under a distributed strategy every rank cuts the same windows and draws the same order of batches, so that the ranks
    meet long batches at the same step and do not wait for one another.

    Args:
        sampler: The rows in random order, for instance an :class:`EpochRandomSampler`. If it has an ``epoch``, the
            order of the batches depends on that too.
        batch_size: Rows in a batch, at least 1.
        drop_last: True to leave out an incomplete last batch.
        lengths: The length of each row of the data set, by index.
        seed: With the epoch, all that the order of the batches depends on.
        window: Batches that are sorted together, at least 1. More means less padding and less randomness.

    Raises:
        ConfigError: If ``window`` or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool,
        lengths: Sequence[int],
        seed: int = 0,
        window: int = 50,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ConfigError(f"LengthBucketBatchSampler: {name} is {value!r}; it must be at least 1.")
        super().__init__(sampler, batch_size, drop_last)
        self.lengths = lengths
        self.seed = seed
        self.window = window

    def set_epoch(self, epoch: int) -> None:
        """Pass ``epoch`` on to the sampler (Lightning sets it there itself)."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        generator = seeded_generator(self.seed, getattr(self.sampler, "epoch", 0))
        indices = iter(self.sampler)
        while rows := list(islice(indices, self.batch_size * self.window)):
            whole = len(rows) - len(rows) % self.batch_size
            tail = rows[whole:]
            rows = sorted(rows[:whole], key=self.lengths.__getitem__)
            batches = [rows[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
            if tail and not self.drop_last:
                batches.append(tail)
            # The seed knows no rank: all ranks meet long batches at the same step, and none waits.
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` that goes on in the middle of an epoch, with the batches that a straight run would see.

    Lightning keeps the state of a loader that has one in every checkpoint, and gives it back when the run is resumed.
    The batches that were seen are then fetched once more and dropped, which costs their preparation but no step. The
    sampler must have an ``epoch``, as those here and torch's ``DistributedSampler`` have; else the epoch begins anew.

    It starts when its first batch is asked for, not when ``iter`` is called: Lightning calls ``iter`` on the training
    loader once before it calls ``set_epoch`` for the first epoch of a run. With ``num_workers`` > 0 torch then draws
    the first batches at once, so that a resumed run would begin with the batches of epoch 0.
    """

    # Not in __init__, so that Lightning can build the loader again from the arguments it knows of a DataLoader.
    _epoch: int | None = None
    _batches = 0
    _resumes = False

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind these batches, if the next ``iter`` is of the same epoch."""
        self._epoch, self._batches, self._resumes = state["epoch"], state["batches"], True

    def __iter__(self) -> Iterator:  # type: ignore[override]
        # Under a distributed strategy Lightning replaces the sampler inside the batch sampler.
        epoch = getattr(getattr(self.batch_sampler, "sampler", self.sampler), "epoch", None)
        resumes = self._resumes and epoch is not None and epoch == self._epoch
        seen = self._batches if resumes else 0
        self._epoch, self._batches, self._resumes = epoch, seen, False
        for batch in islice(super().__iter__(), seen, None):
            self._batches += 1
            yield batch
