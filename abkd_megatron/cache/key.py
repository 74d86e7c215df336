"""Key of a sample: a hash of everything that a teacher's record of it depends on."""

import hashlib
from collections.abc import Mapping

import numpy as np
from torch import Tensor

KEY_BYTES = 16

# Arrays of Megatron's samples that determine the record: what the model reads, and the labels of `label_log_prob`.
_READ = ("tokens", "labels", "position_ids")


def sample_key(sample: Mapping[str, Tensor]) -> bytes:
    """Return the key of a sample, `KEY_BYTES` of BLAKE2b.

    It does not depend on the sample's number, data set, blend, seed or micro-batch, nor on its loss mask.

    Args:
        sample: of a Megatron data set: `tokens`, `labels` and `position_ids`, [s] int64 each, and for packed sequences
            `cu_seqlens`, [any] int32, whose entries may repeat the last one as padding.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in _READ:
        digest.update(sample[name].numpy().astype("<i4").tobytes())
    if (bounds := sample.get("cu_seqlens")) is not None:
        digest.update(np.unique(bounds.numpy()).astype("<i4").tobytes())
    return digest.digest()
