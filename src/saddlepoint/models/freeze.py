"""Run a network as it would be deployed, and hand it back exactly as it was."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


@dataclass
class _Hold:
    """Who holds a network frozen: re-entrant within a thread, exclusive between threads."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    depth: int = 0


_holds: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()
_holds_lock = threading.Lock()
_nesting = threading.local()  # .depth: how many calls of `frozen` this thread is inside of


@contextmanager
def _frozen_module(net: nn.Module) -> Iterator[None]:
    with _holds_lock:
        hold = _holds.setdefault(net, _Hold())
    with hold.lock, ExitStack() as stack:
        if not hold.depth:
            stack.enter_context(_modes_and_buffers_kept(net))
        hold.depth += 1
        try:
            yield
        finally:
            hold.depth -= 1


@contextmanager
def _modes_and_buffers_kept(net: nn.Module) -> Iterator[None]:
    """Eval mode inside. Afterwards every module has its flag and its own buffers again, with their contents."""
    training = [(module, module.training) for module in net.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        net.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer  # a module may put another tensor in its place
                if not torch.equal(buffer, saved):  # a needless copy would invalidate graphs that hold the buffer
                    buffer.copy_(saved)


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Restore torch's, numpy's and Python's global random states on leaving."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # it is restored, not used
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    cpu = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def frozen(nets: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode for every network; afterwards, also after an exception, modes, buffers and random states are as before.

    Parameters are left alone: gradients are taken with respect to inputs only, so `requires_grad` need not change.
    Random states are restored by the outermost of nested calls, so that a random model draws afresh inside.
    """
    with ExitStack() as stack:
        for net in sorted(set(nets), key=id):  # one order for all threads, or two of them could wait for each other
            stack.enter_context(_frozen_module(net))
        if not getattr(_nesting, "depth", 0):
            stack.enter_context(global_random_state_kept())
        _nesting.depth = getattr(_nesting, "depth", 0) + 1
        try:
            yield
        finally:
            _nesting.depth -= 1
