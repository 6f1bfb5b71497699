"""Damage, by a seeded generator: to the bytes of any file, and to nested plain values whatever file they came from.

Nothing here knows what a checkpoint is. ``bytes_of`` and ``values_of`` yield (what was done, the damaged copy).
"""

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from random import Random
from typing import Any

import torch
from torch import Tensor

Step = str | int
Change = Callable[[Any], Any]


def bytes_of(content: bytes, random: Random, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of a file's ``content``: cut, flipped, inserted into, glued, or something else."""
    fixed = [
        ("empty", b""),
        ("text", b"a text file, and no checkpoint\n" * 20),
        ("zeros", bytes(len(content))),
        ("a zip of text", _zip({"readme.txt": b"hello"})),
        ("a zip with a pickle of another kind", _zip({"archive/data.pkl": b"\x80\x02N.", "archive/version": b"3\n"})),
        ("a zip that calls itself TorchScript", _zip({"a/constants.pkl": b"\x80\x02).", "a/version": b"3\n"})),
        ("a tar's beginning", b"storages\0" + bytes(504)),
        ("a pickle of None", b"\x80\x02N."),
        ("two files glued", content + content),
        ("half a file glued before a whole", content[: len(content) // 2] + content),
        ("JSON", b'{"state_dict": {}}'),
    ]
    yield from fixed[:count]
    for _ in range(count - len(fixed)):
        kind = random.choice(["cut", "cut", "flip", "flip", "flip", "insert", "overwrite", "drop"])
        at = random.randrange(len(content))
        some = random.randbytes(random.choice([1, 4, 64]))
        if kind == "cut":
            yield f"cut at {at}", content[:at]
        elif kind == "flip":
            changed = bytearray(content)
            changed[at] ^= 1 << random.randrange(8)
            yield f"a bit flipped at {at}", bytes(changed)
        elif kind == "insert":
            yield f"{len(some)} bytes inserted at {at}", content[:at] + some + content[at:]
        elif kind == "overwrite":
            yield f"{len(some)} bytes overwritten at {at}", content[:at] + some + content[at + len(some) :]
        else:
            yield f"{len(some)} bytes dropped at {at}", content[:at] + content[at + len(some) :]


def values_of(
    value: dict[str, Any], random: Random, count: int, below: tuple[Step, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``count`` copies of nested ``value``, each with one thing changed at or below the path ``below``."""
    places = [path for path in _paths(value) if path[: len(below)] == below and path]
    for _ in range(count):
        # Shorter paths first come as often as longer ones, else the tensors of the optimizer would drown the rest.
        depth = random.choice(sorted({len(path) for path in places}))
        path = random.choice([path for path in places if len(path) == depth])
        found = look_up(value, path)
        name, change = random.choice(_changes(found, isinstance(look_up(value, path[:-1]), Mapping)))
        yield f"{_shown(path)}: {name}", changed(value, path, change)


def changed(value: dict[str, Any], path: tuple[Step, ...], change: Change | None) -> dict[str, Any]:
    """A copy of ``value`` in which ``change`` was made at ``path``; None removes what is there."""
    copy = deepcopy(value)
    owner = look_up(copy, path[:-1])
    if isinstance(owner, tuple):
        items = list(owner)
        items[path[-1]] = change(items[path[-1]]) if change else None
        return changed(copy, path[:-1], lambda _: tuple(items))
    if change is RENAME:
        owner[f"{path[-1]}_"] = owner.pop(path[-1])
    elif change is PREFIX:
        owner[f"module.{path[-1]}"] = owner[path[-1]]
    elif change is None:
        del owner[path[-1]]
    else:
        owner[path[-1]] = change(owner[path[-1]])
    return copy


def RENAME(value: Any) -> Any:  # noqa: N802
    """Marks that the key is to be renamed."""
    return value


def PREFIX(value: Any) -> Any:  # noqa: N802
    """Marks that the entry is to stand there a second time, under a longer key."""
    return value


def look_up(value: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def deep(depth: int, make: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    """Something inside something inside something."""
    value: Any = None
    for _ in range(depth):
        value = make(value)
    return value


def bomb(levels: int = 30) -> Any:
    """A list of a few hundred bytes on disk that unfolds to 10 ** levels values."""
    value: Any = 0
    for _ in range(levels):
        value = [value] * 10
    return value


ODD_VALUES: dict[str, Any] = {
    "None": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "10**9": 10**9,
    "2**62": 2**62,
    "10**30": 10**30,
    "10**5000": 10**5000,
    "1e400": 1e400,
    "NaN": float("nan"),
    "no text": "",
    "os.system": "os.system",
    "torch.nn.Linear": "torch.nn.Linear",
    "Method": "Method",
    "__init__": "__init__",
    "a regular expression with an error": "(",
    "bytes": b"\x00\xff",
    "an empty list": [],
    "an empty mapping": {},
    "a list of a list": [["a"]],
    "[10**30]": [10**30],
    "a mapping of numbers": {1: 2},
    "a method": {"method": "LoRA", "r": 10**9},
    "a method that is no method": {"method": "os.system", "command": "true"},
    "a list 50 deep": deep(50),
    "a list 300 deep": deep(300),
    "methods 200 deep": deep(200, lambda inner: {"method": "Combine", "methods": [inner, inner]}),
    "10**30 values": bomb(),
    "a number in a tensor": torch.tensor(3.0),
    "a tensor": torch.zeros(3, 3),
    "a set": {1, "a"},
}

TENSOR_CHANGES: dict[str, Change] = {
    "one more in each dimension": lambda t: torch.zeros([size + 1 for size in t.shape] or [2], dtype=t.dtype),
    "one more dimension": lambda t: t[None],
    "no elements": lambda t: t.new_zeros(0),
    "fp16": lambda t: t.half(),
    "bf16": lambda t: t.bfloat16(),
    "fp64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "quantized": lambda t: _quantized(t.float()),
    "sparse": lambda t: t.float().to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "NaN": lambda t: torch.full_like(t.float(), float("nan")),
    "infinite": lambda t: torch.full_like(t.float(), float("inf")),
    "a terabyte of one value": lambda t: torch.zeros(1).expand(10**6, 10**6),
    "a list": lambda t: t.tolist(),
    "its name": lambda t: "tensor",
    "None": lambda t: None,
}


def _changes(found: Any, named: bool) -> list[tuple[str, Change | None]]:
    odd: list[tuple[str, Change | None]] = [(name, lambda _, new=new: new) for name, new in ODD_VALUES.items()]
    general: list[tuple[str, Change | None]] = [("removed", None)]
    if named:
        general += [("renamed", RENAME), ("twice, prefixed", PREFIX)]
    return [*general, *TENSOR_CHANGES.items()] if isinstance(found, Tensor) else [*general * 3, *odd]


def _paths(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    yield path
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value[:3]):
            yield from _paths(item, (*path, i))


def _shown(path: tuple[Step, ...]) -> str:
    return "".join(f"[{step!r}]" for step in path)


def _quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still there
        return torch.quantize_per_tensor(tensor, 0.1, 10, torch.qint8)


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()
