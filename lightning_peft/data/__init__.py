"""One file a LightningDataModule; the rest is what they share.

``datasets`` and ``transformers`` are imported when data is first loaded, not here.
"""

from lightning_peft.data.instructions import InstructionData
from lightning_peft.data.sampler import EpochRandomSampler, LengthBucketBatchSampler, ResumableDataLoader
from lightning_peft.data.text import TextData
from lightning_peft.data.text_classification import TextClassificationData

__all__ = [
    "EpochRandomSampler",
    "InstructionData",
    "LengthBucketBatchSampler",
    "ResumableDataLoader",
    "TextClassificationData",
    "TextData",
]
