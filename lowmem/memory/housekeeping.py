"""Garbage collection, the CUDA cache and the allocator's settings, kept out of the hot path."""

import gc
import os
import sys

import torch


def freeze_garbage() -> None:
    """After set-up: what exists now is never looked at again, and collection happens only when asked for."""
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_garbage() -> None:
    """At an epoch's end."""
    gc.collect()


def thaw_garbage() -> None:
    """Back to Python's own cadence, at the end of a run."""
    gc.enable()
    gc.unfreeze()


def release_cache(device: torch.device) -> None:
    """Return cached blocks to the card, where the shapes change (training to evaluation and back)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepare_allocator() -> None:
    """Expandable segments, which fragment less; they must be asked for before the first CUDA allocation.

    Not on Windows, where torch does not support them; a setting of the user's stands.
    """
    if sys.platform != "win32" and not any(
        name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
