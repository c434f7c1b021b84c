"""The order of pictures' numbers in memory: channel by channel, or (channels last) pixel by pixel.

Tensor cores take convolutions pixel by pixel; given them channel by channel, cuDNN turns every feature map around and
back. The order of the weights decides: a convolution with turned weights gives a turned feature map, and the layers
behind it keep it.
"""

from __future__ import annotations

from torch import channels_last, contiguous_format, nn


def channels_last_(network: nn.Module, on: bool = True) -> int:
    """Let the convolutions of ``network`` work pixel by pixel, or (``on=False``) again channel by channel.

    No number changes, only where it lies, so it can be switched at any time: parameters stay the same objects, and
    adapters are merged into either order. Results differ in the last bits, as another algorithm rounds otherwise.
    Weights that were mapped from a file are copied into memory. Convolutions of one pixel have the same order twice.

    Args:
        network: any module; a UNet, a ControlNet, an autoencoder.
        on: False is the off switch.

    Returns:
        The number of weights that were rewritten; 0 when all of them had that order already.
    """
    wanted, changed = channels_last if on else contiguous_format, 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_contiguous(memory_format=wanted):
            # Into the parameter itself, which adapters and offloading know.
            module.weight.data = module.weight.data.contiguous(memory_format=wanted)
            changed += 1
    return changed
