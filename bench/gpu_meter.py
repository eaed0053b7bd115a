"""Times the calls of networks inside a pipeline, whoever's pipeline it is, and counts what they were given."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from bench.flops import dit_flops, tokens

TRANSFORMER = "transformer"


class Meter:
    """While entered, takes the time of every forward by hooks; it never makes the device wait.

    On a GPU the times are those of events in its stream, and are to be read after a synchronisation.
    """

    def __init__(self, networks: Mapping[str, Sequence[nn.Module]], device: str) -> None:
        """Each name stands for the modules that do its work, of which one is called at a time. One of the names is
        `transformer`, whose items and arithmetic are counted as well.
        """
        self._networks = dict(networks)
        self._device = device
        self._handles: list[Any] = []
        self._begun: dict[str, Any] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in self._networks}
        self.items: list[int] = []  # pictures in each forward of the transformer
        self.captions: list[int] = []  # tokens, of each of those pictures
        self.flops = 0  # of the transformer, for its items alone: what pads them to a common length is not work
        self.tokens = 0  # of those items, picture and caption
        self.computed = 0  # tokens with the padding

    def ms(self, name: str) -> list[float]:
        """Return the milliseconds of each forward of a network."""
        return [self._between(*span) for span in self._spans[name]]

    def __enter__(self) -> Self:
        for name, network in ((name, network) for name, networks in self._networks.items() for network in networks):
            self._handles += [
                network.register_forward_pre_hook(self._before(name), with_kwargs=True),
                network.register_forward_hook(self._after(name)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, name: str) -> Any:
        def hook(network: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name == TRANSFORMER:
                latents = args[0] if args else kwargs["x"]
                self._count(network, latents, args[2] if len(args) > 2 else kwargs["cap_feats"])
            self._begun[name] = self._now()

        return hook

    def _after(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self._spans[name].append((self._begun.pop(name), self._now()))

        return hook

    def _count(self, network: Any, latents: Sequence[torch.Tensor], captions: Sequence[torch.Tensor]) -> None:
        self.items.append(len(latents))
        lengths = []
        for item, caption in zip(latents, captions, strict=True):
            rows, columns = item.shape[-2:]
            self.captions.append(len(caption))
            self.flops += dit_flops(network.config, rows=rows, columns=columns, caption=len(caption))
            lengths.append(sum(tokens(network.config, rows=rows, columns=columns, caption=len(caption))))
        self.tokens += sum(lengths)
        self.computed += len(lengths) * max(lengths)

    def _now(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        cuda: Any = torch.cuda  # annotated in part
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        if self._device != "cuda":
            return float(ended - begun) * 1000
        return float(begun.elapsed_time(ended))
