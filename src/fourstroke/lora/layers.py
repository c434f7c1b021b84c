"""LoRA for training, as pure functions over a module that stays as it is.

The pairs are ordinary leaf tensors outside the model; a forward pass runs with the weights that they produce::

    pairs = init_pairs(unet, LCM_LORA_TARGETS, rank=32, alpha=16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable(pairs), lr=1e-3)
    unet.requires_grad_(False)  # biases, norms and all else that has no pair

    student = torch.func.functional_call(unet, effective_weights(unet, pairs), (latents, t, text))  # gradients to pairs
    teacher = unet(latents, t, text)                                                                # the untouched base

    save_lora("lcm.safetensors", Lora("lcm", {"unet": pairs}), layout="kohya")   # from fourstroke.lora.weights

``pairs`` maps parameter names (``mid_block.resnets.0.conv1.weight``) to `LoraPair`; a new pair has ``up = 0``, so that
training starts at the base model. The effective weights come from the same `merge_weight` that inference uses. Compute
them once a step and pass them to every forward pass of that step: each call builds all of them anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .merge import merge_weight
from .pairs import LoraError, LoraPair

LCM_LORA_TARGETS: tuple[str, ...] = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Module-name endings that the published LCM-LoRAs adapt (arXiv 2311.05556): attention, feed-forward, convolutions."""


def init_pairs(
    model: nn.Module,
    targets: Sequence[str] = LCM_LORA_TARGETS,
    rank: int = 64,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LoraPair]:
    """Make trainable pairs for every linear and convolution layer whose name ends in one of ``targets``.

    ``down`` is drawn as a linear layer's weight is (uniform within ``1 / sqrt(fan_in)``), ``up`` is zero. Both are
    float32 leaf tensors that require gradients, on the device of the layer.

    Args:
        model: the module to adapt; it is not changed.
        targets: whole trailing parts of module names, such as ``"to_q"`` or ``"ff.net.2"``.
        rank: inner dimension, at least 1.
        alpha: numerator of the scale ``alpha / rank``; ``None`` gives ``alpha = rank``, hence scale 1.
        generator: CPU generator of the random numbers.

    Returns:
        Parameter name (``….weight``) to pair, in the order of ``model.named_modules()``.

    Raises:
        LoraError: rank below 1, a target that names no layer, or one that names a layer of another kind.
    """
    if rank < 1:
        raise LoraError(f"rank must be at least 1, got {rank}")
    pairs: dict[str, LoraPair] = {}
    unmatched = set(targets)
    for name, module in model.named_modules():
        matches = {target for target in targets if name == target or name.endswith(f".{target}")}
        if not matches:
            continue
        unmatched -= matches
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            raise LoraError(f"target {name} is a {type(module).__name__}; only Linear and Conv layers take a pair")
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups != 1:
            raise LoraError(f"target {name} is a grouped convolution (groups={module.groups}); leave it out of targets")
        pairs[f"{name}.weight"] = _init_pair(module.weight, rank, alpha, generator)
    if unmatched:
        raise LoraError(f"no module of {type(model).__name__} is named {sorted(unmatched)}; leave them out of targets")
    return pairs


def _init_pair(weight: Tensor, rank: int, alpha: float | None, generator: torch.Generator | None) -> LoraPair:
    out_features, *fan_in = weight.shape
    bound = 1.0 / math.sqrt(math.prod(fan_in))
    down = torch.empty(rank, *fan_in).uniform_(-bound, bound, generator=generator).to(weight.device)
    up = torch.zeros(out_features, rank, *[1] * (len(fan_in) - 1), device=weight.device)
    return LoraPair(down.requires_grad_(), up.requires_grad_(), float(rank if alpha is None else alpha))


def trainable(pairs: Mapping[str, LoraPair]) -> list[Tensor]:
    """Return the leaf tensors of all pairs (down, up, down, up, …), in a fixed order, for an optimizer or an EMA."""
    return [tensor for pair in pairs.values() for tensor in (pair.down, pair.up)]


def effective_weights(model: nn.Module, pairs: Mapping[str, LoraPair], factor: float = 1.0) -> dict[str, Tensor]:
    """Return the adapted parameters by name, for ``torch.func.functional_call(model, weights, args)``.

    Differentiable in the pairs; the model's own parameters are detached and never changed. Computed in float32 and
    given in the parameter's dtype.

    Raises:
        LoraError: a pair names no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    missing = sorted(pairs.keys() - parameters.keys())
    if missing:
        raise LoraError(f"{type(model).__name__} has no parameter {', '.join(missing)}")
    return {name: merge_weight(parameters[name].detach(), [(pair, factor)]) for name, pair in pairs.items()}
