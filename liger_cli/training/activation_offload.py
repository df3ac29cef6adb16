"""Keep the inputs of checkpointed layers in the memory of the host until backward asks for them.

A checkpointed layer keeps one tensor, its input, and recomputes the rest from it. Hooks on saved
tensors surround the checkpoint and so see that input alone, since inside of it the checkpoint's own
hooks decide. Each input is copied out on one stream while its layer computes, and copied back on
another while backward is one layer ahead of it. Streams wait for each other by events and the host
waits for nothing. The bits are those that were saved, so gradients are the same to the bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError

__all__ = ["ActivationOffload", "HostPages", "checkpoint_layers", "offload_of"]

# Of pinned memory: a copy of so many bytes takes far longer than to ask for it.
_LEAST_PAGE = 1 << 24


def checkpoint_layers(
    model: Any, offload: ActivationOffload | None = None, **settings: Any
) -> None:
    """Let each layer of a model keep its input alone and recompute the rest in backward.

    Args:
        model: A transformers model, or a PEFT wrapper of one.
        offload: Takes the inputs to the memory of the host; None keeps them on the device.
        settings: For torch.utils.checkpoint.checkpoint.

    Raises:
        ConfigError: The model's layers cannot be reached by offload.
    """
    # Renamed in transformers 5.24; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False, **settings})
    if offload is None:
        return
    name = "_gradient_checkpointing_func"
    layers = [module for module in model.modules() if name in vars(module)]
    if not layers:
        raise ConfigError(
            f"activation_offloading: {type(model).__name__} checkpoints its layers in code that "
            "transformers' own checkpoint function does not reach",
            hint="Set activation_offloading to false.",
        )
    for layer in layers:
        setattr(layer, name, functools.partial(offload.checkpoint, getattr(layer, name)))


def offload_of(
    config: RunConfig,
    device: torch.device,
    notify: Callable[[str], None],
    host_bytes: int | None = None,
) -> ActivationOffload | None:
    """Return the offload that a run asks for, or None.

    Args:
        config: Of the run.
        device: Of the model.
        notify: Gets a line where pinned memory cannot be had, or the run is on a CPU.
        host_bytes: That it may take of the host.
    """
    if config.activation_offloading is not True:
        return None
    if device.type == "cpu":
        notify(
            "activation_offloading: on a CPU inputs of layers are copied, and no memory is saved"
        )
    return ActivationOffload(device, HostPages(_pinned_bytes(device, notify), host_bytes))


def _pinned_bytes(device: torch.device, notify: Callable[[str], None]) -> Callable[[int], Tensor]:
    """Return a function that allocates bytes of host memory, which copies of a GPU reach directly.

    Args:
        device: Where the copies come from; memory for any but a CUDA device is not pinned.
        notify: Gets a line where the system has no pinned memory left.
    """
    pins = device.type == "cuda"

    def allocate(num_bytes: int) -> Tensor:
        nonlocal pins
        if pins:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                pins = False
                reason = (str(error).splitlines() or ["no message"])[0]
                notify(
                    f"activation_offloading: no pinned memory ({reason}); memory that is not "
                    "pinned serves, and the GPU waits for its copies"
                )
        return torch.empty(num_bytes, dtype=torch.uint8)

    return allocate


class _Page:
    """Host memory, and the event after which it may be written to."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.last_read: Any = None


class HostPages:
    """Host memory in pages of one size that are used again.

    torch rounds what it pins up to a power of two. A page is one, an eighth of the first tensor or
    less: so little is lost, and tensors of any length share the pages.

    Args:
        allocate: Returns so many bytes, uint8.
        most_bytes: That all pages may take; None: as many as are asked for.

    Attributes:
        num_allocated: Pages that exist.
        page_bytes: Of each; 0 before the first.
    """

    def __init__(self, allocate: Callable[[int], Tensor], most_bytes: int | None = None) -> None:
        self._allocate, self._most = allocate, most_bytes
        self._free: list[_Page] = []
        self.num_allocated = self.page_bytes = 0

    def take(self, num_bytes: int) -> list[_Page] | None:
        """Return pages of so many bytes together; None where they would be more than may be."""
        if not self.page_bytes:
            self.page_bytes = max(_LEAST_PAGE, 1 << max(0, (num_bytes // 8).bit_length() - 1))
        count = -(-num_bytes // self.page_bytes)
        num_all = self.num_allocated + max(0, count - len(self._free))
        if self._most is not None and num_all * self.page_bytes > self._most:
            return None
        while self.num_allocated < num_all:
            self._free.append(_Page(self._allocate(self.page_bytes)))
            self.num_allocated += 1
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give(self, pages: list[_Page]) -> None:
        """Take pages back that are not needed any more."""
        self._free += pages


class _CopyStream:
    """A stream that copies; on a device without streams copies run in their order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: Tensor, source: Tensor, *, after: Any = None) -> Any:
        """Copy after an event and after what the current stream has been given; return the end."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


class _Input:
    """The input of a layer in host memory, and on the device before it leaves or once it is back.

    A tensor is allocated and freed on the stream that computes, and before it is freed there that
    stream waits for the copy. So the allocator need not know of the other streams.
    """

    def __init__(
        self, x: Tensor, owner: ActivationOffload, pages: list[_Page], before: Callable[[], Any]
    ) -> None:
        self._owner, self._pages, self.before = owner, pages, before
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._on_device: Tensor | None = x
        self._copied: Any = None
        for page, part in self._parts(x):
            self._copied = owner.out.copy(page.data[: len(part)], part, after=page.last_read)

    def _parts(self, x: Tensor) -> Iterator[tuple[_Page, Tensor]]:
        """Yield each page, with the bytes of x that it holds."""
        parts = x.view(-1).view(torch.uint8).split(len(self._pages[0].data))
        return zip(self._pages, parts, strict=True)

    def leave(self) -> None:
        """Free the tensor on the device."""
        if self._on_device is not None:
            self._wait()
            self._on_device = None

    def fetch(self) -> None:
        """Begin to copy it back, unless it is there."""
        if self._on_device is None:
            self._on_device = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            copied = self._copied
            for page, part in self._parts(self._on_device):
                source = page.data[: len(part)]
                page.last_read = self._owner.back.copy(part, source, after=copied)
            self._copied = self._pages[-1].last_read

    def get(self) -> Tensor:
        """Return it on the device, to be used on the current stream."""
        self.fetch()
        x, self._on_device = self._on_device, None
        self._wait()
        assert x is not None
        return x

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def __del__(self) -> None:
        # Backward may have ended early, with a copy on its way.
        self.leave()
        self._owner.pages.give(self._pages)


class ActivationOffload:
    """Takes the inputs of checkpointed layers to host memory and brings them back.

    Args:
        device: Of the model.
        pages: The host memory. What does not fit into it stays on the device.

    Attributes:
        num_kept: Inputs that were taken so far.
        num_left: Inputs that stayed, because the pages were full.
        out: Copies to the host.
        back: Copies to the device.
    """

    def __init__(self, device: torch.device, pages: HostPages) -> None:
        self._device, self.pages = device, pages
        self.out, self.back = _CopyStream(device), _CopyStream(device)
        self.num_kept = self.num_left = 0
        # The input that was taken last: weak, since the graph alone decides how long it lives.
        self._last: Callable[[], Any] = lambda: None

    def checkpoint(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `run`, a checkpoint function, with its arguments."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return run(*args, **kwargs)

    def _pack(self, x: Tensor) -> Tensor | _Input:
        is_input = x.requires_grad and x.is_floating_point() and x.numel() > 0
        if not is_input or x.device.type != self._device.type:
            # Masks and positions are shared by all layers, and torch before 2.13 saves an empty
            # tensor beside the inputs, on the CPU.
            return x
        last = self._last()
        if last is not None:
            # Its layer has run. The last of all stays, as backward begins with it.
            last.leave()
        pages = self.pages.take(x.numel() * x.element_size())
        if pages is None:
            # Layers come in their order: those whose backward is first stay.
            self.num_left += 1
            return x.detach()
        kept = _Input(x.detach().contiguous(), self, pages, self._last)
        self._last = weakref.ref(kept)
        self.num_kept += 1
        return kept

    def _unpack(self, kept: Tensor | _Input) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.get()
        before = kept.before()
        if before is not None:
            before.fetch()
        return x
