"""Where what was measured on a device is kept: a file in the user's cache for each device and its versions."""

import re
from pathlib import Path

import platformdirs
import torch


def kept_file(room: str, device: torch.device, detail: str = "") -> Path:
    """The file of a device in a folder of the cache; another card, cuDNN, torch, processor or number of threads has another one."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} cudnn {torch.backends.cudnn.version()}"
    else:
        name = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    text = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} torch {torch.__version__} {detail}".strip())
    return Path(platformdirs.user_cache_dir("lowmem")) / room / f"{text}.json"
