"""Samplers whose order is a pure function of (seed, epoch), so that a resumed run sees what a straight run sees.

Lightning calls ``set_epoch`` on a loader's ``sampler`` and on its ``batch_sampler.sampler`` before each epoch. Under a
distributed strategy it replaces the latter by a ``DistributedSampler`` (which has an ``epoch`` of its own) and builds
the batch sampler again with the arguments it was first built with. Both samplers here are made for exactly that.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

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
        drop_last: Whether to leave out an incomplete last batch.
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
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]


class LateStartDataLoader(DataLoader):
    """A ``DataLoader`` that starts when its first batch is asked for, not when ``iter`` is called.

    Lightning calls ``iter`` on the training loader once before it calls ``set_epoch`` for the first epoch of a run.
    With ``num_workers`` > 0 torch then draws the first batches at once, so that a resumed run would begin with the
    batches of epoch 0.
    """

    def __iter__(self) -> Iterator:  # type: ignore[override]
        yield from super().__iter__()
