"""Every random draw of a run: a function of (seed, purpose, epoch, index), never of what was drawn before.

Counter-based generators (Philox; Salmon et al., 2011) make the draw for one sample independent of the workers, the
order and the resumptions in between.
"""

import hashlib
import struct

import numpy as np


def key(seed: int, purpose: str, *counters: int) -> int:
    """128 bits that depend on every argument (BLAKE2b)."""
    packed = struct.pack(f"<{len(counters) + 1}q", seed, *counters) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A generator for one purpose at one place in the run; e.g. ("augment", epoch, sample index)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *counters)))


def torch_seed(seed: int, purpose: str, *counters: int) -> int:
    """A non-negative seed of 63 bits for torch.manual_seed."""
    return key(seed, purpose, *counters) & (2**63 - 1)
