"""What moves between files in main memory and the device that merges, while it computes.

On a GPU three streams run side by side: `copies` brings the next tensors from pinned memory and
takes their differences, `computing` merges the present ones, `results` brings the last ones back.
A load is one ahead of the computing, so that two are on the device at a time: two buffers in turn.
Events order them, and no stream waits for another without need; the process waits only where a
method looks at a value, and where a result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from merging.factors import Factors

Send = Callable[[Tensor], Tensor]  # to the device; holds once the load has arrived
Loaded = TypeVar("Loaded")
Merged = Tensor | Factors


def stay(tensor: Tensor) -> Tensor:
    """Sent to main memory, where it is."""
    return tensor


class Transfers(Protocol):
    """Between main memory and one device."""

    def load(self, read: Callable[[Send], Loaded]) -> tuple[Loaded, Any]:
        """Begin to read and send; called in a thread of its own, one load ahead."""
        ...

    def receive(self, begun: tuple[Loaded, Any]) -> Loaded:
        """What a load brought, for the thread that computes."""
        ...

    def back(self, merged: Merged) -> Callable[[], Merged]:
        """Begin to bring a result back; what is returned waits for it."""
        ...

    def free(self) -> None:
        """Give back what the device's allocator keeps."""
        ...


class InPlace:
    """On the CPU nothing moves."""

    def load(self, read: Callable[[Send], Loaded]) -> tuple[Loaded, None]:
        return read(stay), None

    def receive(self, begun: tuple[Loaded, None]) -> Loaded:
        return begun[0]

    def back(self, merged: Merged) -> Callable[[], Merged]:
        return lambda: merged

    def free(self) -> None:
        """There is no allocator that keeps any."""


class Streams:
    """To and from a GPU, which computes on its default stream."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.copies, self.results = self._stream(), self._stream()
        self.computing = self._default()

    def load(self, read: Callable[[Send], Loaded]) -> tuple[Loaded, Any]:
        with self._on(self.copies):
            loaded = read(self.send)
        return loaded, self.copies.record_event()

    def send(self, tensor: Tensor) -> Tensor:
        """From pinned memory, without waiting; its buffer is used anew when the copy is done."""
        return self._pinned(tensor).to(self.device, non_blocking=True)

    def receive(self, begun: tuple[Loaded, Any]) -> Loaded:
        loaded, arrived = begun
        self.computing.wait_event(arrived)
        for tensor in tensors(loaded):  # their memory is that of the stream that made them
            self._used_on(tensor, self.computing)
        return loaded

    def back(self, merged: Merged) -> Callable[[], Merged]:
        self.results.wait_event(self.computing.record_event())
        with self._on(self.results):
            host = _each(merged, self._fetch)
        arrived = self.results.record_event()

        def wait() -> Merged:
            arrived.synchronize()
            return host

        return wait

    def _fetch(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":  # of a route that does not leave it
            return tensor
        self._used_on(tensor, self.results)
        return self._empty_pinned(tensor).copy_(tensor, non_blocking=True)

    # --- what CUDA does, so that tests on a CPU may stand in for it -------------------------------

    def _stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def _default(self) -> Any:
        return torch.cuda.default_stream(self.device)

    def _on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().pin_memory()

    def _empty_pinned(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def _used_on(self, tensor: Tensor, stream: Any) -> None:
        if tensor.device.type != "cpu":
            tensor.record_stream(stream)

    def free(self) -> None:
        torch.cuda.empty_cache()


def transfers(device: str) -> Transfers:
    """Those of a device."""
    return Streams(device) if torch.device(device).type == "cuda" else InPlace()


def begin(devices: Sequence[str]) -> None:
    """Load torch's linear algebra in this thread: several cannot at once (pytorch issue 90613)."""
    for device in devices:
        if torch.device(device).type == "cuda":
            torch.linalg.inv(torch.ones(1, 1, device=device))


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32: neither TF32 nor bfloat16, whatever was set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stated(devices: Sequence[str]) -> list[str]:
    """How a GPU computes, for the report."""
    if all(torch.device(device).type != "cuda" for device in devices):
        return []
    return [
        "the GPU's products are in full float32, without TF32; what is merged entry by entry is "
        "bound by memory, and merged on the CPU"
    ]


def tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and mappings of them."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from tensors(part)


def _each(merged: Merged, change: Callable[[Tensor], Tensor]) -> Merged:
    """The tensor, or the factors, changed."""
    if isinstance(merged, Factors):
        return Factors(change(merged.A), change(merged.B), merged.scale)
    return change(merged)
