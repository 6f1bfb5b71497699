"""A checksum over nested values and tensors: it tells a file that was damaged or edited from one that was written."""

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor


def checksum(value: Any) -> str:
    """SHA-256 of mappings, sequences, tensors and plain values, in hexadecimal.

    Equal content gives an equal sum on every device. Of objects of other types only the type counts.
    """
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        if value.layout == torch.strided and not value.is_quantized and not value.is_meta:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}".encode())
        # By how keys print: those of different types have no order of their own.
        for key, item in sorted(value.items(), key=lambda pair: repr(pair[0])):
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    elif isinstance(value, (Sequence, Set)):
        items = sorted(value, key=repr) if isinstance(value, Set) else value
        digest.update(f"sequence {len(items)}".encode())
        for item in items:
            _update(digest, item)
    else:
        digest.update(type(value).__qualname__.encode())
