"""The bytes of a safetensors file, one tensor after the other: nothing is copied, so that saving a model takes no second one's
memory, and every write can go through the run's Disk (the library writes by itself, or copies the whole into one string).

Format: 8 bytes little-endian length of a JSON header {name: {dtype, shape, data_offsets}}, the header, the data. It is read with
the safetensors library.
"""

import json
import struct
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_chunks(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The file of these contiguous CPU tensors, in pieces of at most 16 MiB."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    yield memoryview(_header(tensors))
    for tensor in tensors.values():
        data = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        span = [offset, offset + tensor.nbytes]
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
