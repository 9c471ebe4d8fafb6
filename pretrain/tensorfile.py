"""Tensors in safetensors files, written so that nothing is copied, lost or trusted.

Owns: a streaming writer of the safetensors format (https://huggingface.co/docs/safetensors: eight bytes of header size,
a JSON header, raw little-endian data) that hashes while it writes and syncs to disk, so that a checksum costs no second
pass and a full disk shows as an OSError here. Reading is the safetensors library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BLOCK_BYTES = 1 << 22


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write CPU tensors to a new file, sync it to disk, and return its SHA-256 in hexadecimal.

    Raises:
        OSError: the disk is full or the folder is not writable; the file is then incomplete.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
    checksum = hashlib.sha256()
    with open(path, "xb") as file:
        for block in (_header(tensors), *map(_bytes, tensors.values())):
            for start in range(0, len(block), BLOCK_BYTES):  # blocks let other threads in, and end early on errors
                part = block[start : start + BLOCK_BYTES]
                checksum.update(part)
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return checksum.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file on the CPU, in memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def checksum_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(tensors: dict[str, Tensor]) -> memoryview:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
