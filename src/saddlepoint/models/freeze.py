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
from torch import Tensor, nn


@dataclass
class _Hold:
    """Who holds a network frozen: re-entrant within a thread, exclusive between threads."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    depth: int = 0


_holds: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()
_holds_lock = threading.Lock()


@contextmanager
def _frozen_module(net: nn.Module) -> Iterator[None]:
    with _holds_lock:
        hold = _holds.setdefault(net, _Hold())
    with hold.lock:
        hold.depth += 1
        if hold.depth > 1:
            try:
                yield
            finally:
                hold.depth -= 1
            return
        training = [(module, module.training) for module in net.modules()]
        buffers: list[tuple[Tensor, int, Tensor]] = [(b, b._version, b.detach().clone()) for b in net.buffers()]
        try:
            net.eval()
            yield
        finally:
            hold.depth -= 1
            for module, flag in training:
                module.training = flag
            with torch.no_grad():
                for buffer, version, saved in buffers:
                    if buffer._version != version:
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
    """
    with ExitStack() as stack:
        stack.enter_context(global_random_state_kept())
        for net in nets:
            stack.enter_context(_frozen_module(net))
        yield
