"""Text encoders that do not read the same prompt again for every picture.

::

    recall_(text_encoder)    # keeps what it made of the last prompts
    unrecall_(text_encoder)  # the off switch

What is kept is what the encoder answered, to the bit. It is forgotten when weights are written, moved or replaced (by
LoRAs that are merged, embeddings that are added); only writes through ``parameter.data``, which torch does not count,
go unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .calls import Keeping, describe, remember, replace_forward_, restore_forward_, tensors_in

CALLS = 4
"""Answers that are kept: those of the last prompts, guided ones having two."""


class Recalled(Keeping):
    """A network's forward that looks first whether it was asked the same before; see `recall_`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled network remembers for itself."""
        return Recalled, (self.network,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation, or what it was last time; the arguments and the result are those of the network's own."""
        network, arguments = self.network, self.arguments(args, kwargs)
        if torch.is_grad_enabled() or not self._look_after_weights(network):
            return self.plain(arguments)
        values = tuple(tuple(tensor.flatten().tolist()) for tensor in tensors_in(arguments))
        return remember(self._kept, (describe(arguments), values), CALLS, lambda: self.plain(arguments))


def recall_(network: nn.Module) -> None:
    """Keep the answers of the last `CALLS` calls of a text encoder, in the memory of its device.

    Where gradients are wanted, and where torch does not count how often weights are written (`torch.inference_mode`),
    every call is computed as ever.

    Raises:
        RuntimeError: a backend runs ``network``.
    """
    replace_forward_(network, Recalled(network))


def unrecall_(network: nn.Module) -> None:
    """Undo `recall_`, and forget."""
    restore_forward_(network, Recalled)
