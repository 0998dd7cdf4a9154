"""Weights to and from files, without ever running code from them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from saddlepoint.errors import DataError

Net = TypeVar("Net", bound=nn.Module)


def load_weights(net: Net, path: str | Path, *, strict: bool = True) -> Net:
    """Fill `net` from a `.safetensors` file, or a `.pt` or `.pth` file of plain tensors by name, and return it.

    With `strict=False`, names that only one side has are left alone, as long as some agree.
    Raises `DataError`, and leaves `net` as it was, for files that are missing, truncated or not safe to load, and for
    names or shapes that don't fit.
    """
    path = Path(path).expanduser()
    weights = _read(path)
    own: Mapping[str, Tensor] = net.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    if len(missing) == len(own) or (strict and (missing or unexpected)):
        sides = [("lacks", missing), ("has surplus", unexpected)]
        what = " and ".join(f"{verb} {_some(names)}" for verb, names in sides if names)
        raise DataError(f"{path}: doesn't fit {type(net).__name__}: the file {what}; is it another architecture's?")
    for name, tensor in weights.items():
        if name in own and tensor.shape != own[name].shape:
            raise DataError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, {type(net).__name__} needs {tuple(own[name].shape)}; "
                "build the network with the file's in_shape and num_classes"
            )
    net.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    return net


def save_weights(net: nn.Module, path: str | Path) -> None:
    """Write all parameters and buffers of `net` as safetensors, atomically; `DataError` if that can't be done."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: weights are written as safetensors; end the name in .safetensors")
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    content = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.state_dict().items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(safetensors.torch.save(content))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error})") from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such weight file")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise DataError(f"{path}: expected a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # not passed on, because torch's own text suggests to load it anyway
        raise DataError(
            f"{path}: not safe to load: it holds more than plain tensors (or is corrupt), which can run code; "
            "save the state_dict with saddlepoint.zoo.save_weights"
        ) from error
    except Exception as error:  # on corrupt bytes torch raises whatever its unpickler stumbles over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: corrupt, truncated or unreadable weight file ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = f"a dictionary of {_some(list(map(str, content)))}" if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a plain dictionary of tensors (a state_dict), found {found}")
    return content


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
