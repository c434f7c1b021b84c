"""Names of LoRA files: one table per question, total and checked.

A key is ``prefix + module + suffix``. `PREFIXES` tells the component, `SUFFIXES` the tensor's role, and the module is
looked up in `target_names`, which is derived from the model itself: whatever a file calls a module (our name, our name
with underscores, the original "ldm" name), the answer is a path that exists in the model, or none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .pairs import LoraError

PREFIXES: tuple[tuple[str, str | None], ...] = (
    (r"lora_unet_", "unet"),
    (r"lora_te1?_", "text_encoder"),
    (r"lora_te2_", "text_encoder_2"),
    (r"(?:base_model\.model\.)?unet\.(?:base_model\.model\.)?", "unet"),
    (r"(?:base_model\.model\.)?text_encoder\.(?:base_model\.model\.)?", "text_encoder"),
    (r"(?:base_model\.model\.)?text_encoder_2\.(?:base_model\.model\.)?", "text_encoder_2"),
    (r"(?:model\.)?diffusion_model\.", "unet"),
    (r"(?:base_model\.model\.)?", None),
)
"""Start of a key -> component; None: the component is the one that has such a module."""

RENAMES: tuple[tuple[str, str], ...] = (
    (r"^module\.", ""),
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    (r"\.processor\.", "."),
    (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.to_out\.lora_", ".to_out.0.lora_"),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.to_out\.0\.", ".self_attn.out_proj."),
)
"""Spellings of AnimateDiff's and old diffusers' files, in order, for keys with dots."""

_ADAPTER = r"(?:\.[^.]+)?"  # peft may put the adapter's name into the key
SUFFIXES: tuple[tuple[str, str, str | None], ...] = (
    (r"\.lora_down\.weight", "lora.down", "kohya"),
    (r"\.lora_up\.weight", "lora.up", "kohya"),
    (r"\.lora_mid\.weight", "lora.mid", "kohya"),
    (rf"\.lora_A{_ADAPTER}\.weight", "lora.down", "peft"),
    (rf"\.lora_B{_ADAPTER}\.weight", "lora.up", "peft"),
    (rf"\.lora_B{_ADAPTER}\.bias", "lora_bias", "peft"),
    (rf"\.lora_embedding_A{_ADAPTER}", "embedding.A", "peft"),
    (rf"\.lora_embedding_B{_ADAPTER}", "embedding.B", "peft"),
    (r"\.lora\.down\.weight", "lora.down", "diffusers"),
    (r"\.lora\.up\.weight", "lora.up", "diffusers"),
    (rf"\.hada_(?P<field>w[12]_[ab]|t[12]){_ADAPTER}", "hada", "lycoris"),
    (rf"\.lokr_(?P<field>w[12](?:_[ab])?|t2){_ADAPTER}", "lokr", "lycoris"),
    (r"\.(?:diff|w_norm)", "diff.change", "lycoris"),
    (r"\.(?:diff_b|b_norm)", "diff_bias", "lycoris"),
    (r"\.dora_scale", "magnitude", "kohya"),
    (rf"\.lora_magnitude_vector{_ADAPTER}", "magnitude_rows", "peft"),
    (r"\.alpha", "alpha", None),
)
"""End of a key -> role of the tensor (``kind.field``), dialect."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.oft_(?:blocks|diag|R|r)\b", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.on_input$", "IA3"),
    (r"\.(?:q_layer|p_layer|lambda_layer)\b", "T-LoRA"),
    (r"^(?:bundle_emb|emb_params)\b", "a bundled textual-inversion embedding"),
    (r"\.lora_(?:up|down|mid)\.bias$", "a LoRA with biases"),
    (r"^lora_controlnet", "Control-LoRA"),
)
"""Adaptations that exist, but are not run here; their keys are named as such."""

ARCHITECTURES: tuple[tuple[str, str], ...] = (
    (r"(?:double|single)_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|(?:^|\.)transformer\.transformer_blocks", "Stable Diffusion 3"),
    (r"adaln_single|cross_attn_[qkvo]\b|cross_attn\.[qkvo]\b", "a diffusion transformer"),
)
"""Module names that tell another kind of model altogether."""

OR = " or "
"""Between the names of families that a LoRA may be of."""

LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Our name -> original name of the layers inside a residual block."""

LDM_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Our name -> original name of the layers outside the blocks."""


@dataclass(frozen=True)
class Key:
    """A parsed key: component (None when the key does not say), the file's module name, role, dialect."""

    component: str | None
    module: str
    role: str
    dialect: str | None


_PREFIX = [(re.compile(pattern), component) for pattern, component in PREFIXES]
_SUFFIX = [(re.compile(rf"(?P<module>.+){pattern}"), role, dialect) for pattern, role, dialect in SUFFIXES]


def parse_key(key: str) -> Key | None:
    """Split a file's key into component, module and role; None when no row of the tables fits."""
    start, component = next((match.end(), c) for pattern, c in _PREFIX if (match := pattern.match(key)))
    rest = key[start:]
    if not key.startswith("lora_"):
        for pattern, replacement in RENAMES:
            rest = re.sub(pattern, replacement, rest)
    for pattern, role, dialect in _SUFFIX:
        if match := pattern.fullmatch(rest):
            field = match.groupdict().get("field")
            return Key(component, match["module"], f"{role}.{field}" if field else role, dialect)
    return None


def unsupported_kind(key: str) -> str | None:
    """Return what a key that `parse_key` does not know belongs to, when that is known."""
    return next((kind for pattern, kind in UNSUPPORTED if re.search(pattern, key)), None)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wraps (any number of times), or ``module`` itself."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def module_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of every submodule; compiled submodules keep their plain path."""
    for name, module in unwrap(model).named_modules(remove_duplicate=False):
        if name and not name.endswith("_orig_mod"):
            yield name.replace("_orig_mod.", ""), unwrap(module)


def parameter_places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Return every parameter's plain name -> (its module, the attribute there, the parameter itself).

    Shared parameters appear under each of their names.
    """
    places = {}
    for path, module in [("", unwrap(model)), *module_names(model)]:
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places[f"{path}.{attribute}" if path else attribute] = (module, attribute, parameter)
    return places


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter by its plain name; shared ones appear under each of their names."""
    return {name: parameter for name, (_, _, parameter) in parameter_places(model).items()}


def target_names(model: nn.Module) -> dict[str, str]:
    """Return every name that files use for a module of ``model`` -> its path in the model.

    Raises:
        LoraError: one name would mean two modules.
    """
    names: dict[str, str] = {}

    def claim(alias: str, path: str) -> None:
        for name in (alias, alias.replace(".", "_")):
            if names.setdefault(name, path) != path:
                raise LoraError(f"the LoRA name {name} would mean both {names[name]} and {path}; rename one of them")

    paths = [path for path, _ in module_names(model)]
    clip = any(path.endswith("encoder.layers.0.self_attn") for path in paths)
    for path in paths:
        claim(path, path)
        if clip and path != "text_model":  # CLIP has been published with and without this prefix
            bare = path.removeprefix("text_model.")
            claim(bare, path)
            claim(f"text_model.{bare}", path)
    for path, original in ldm_names(paths):
        claim(original, path)
    return names


def ldm_names(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (path, original name) of a UNet's modules as Stability's code and kohya's SDXL trainer name them.

    The original network is a flat list of blocks; its numbers follow from the residual blocks, attentions and samplers
    that ``paths`` has in each block. Nothing is yielded for other networks.
    """
    paths = list(paths)
    block_names = dict(_ldm_blocks(set(paths)))
    for path in paths:
        head = next((head for head in _parents(path) if head in block_names), None)
        if head is None:
            continue
        inner = path[len(head) + 1 :]
        if ".resnets." in head and inner:
            first, _, rest = inner.partition(".")
            inner = ".".join(filter(None, (LDM_RESNET.get(first, first), rest)))
        yield path, f"{block_names[head]}.{inner}" if inner else block_names[head]


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _ldm_blocks(paths: set[str]) -> Iterator[tuple[str, str]]:
    def count(prefix: str) -> Iterator[int]:
        index = 0
        while f"{prefix}.{index}" in paths:
            yield index
            index += 1

    if not {"down_blocks", "mid_block", "up_blocks", "conv_in"} <= paths:
        return
    yield from ((ours, ldm) for ours, ldm in LDM_OUTER.items() if ours in paths)
    number = 1
    for block in count("down_blocks"):
        for layer in count(f"down_blocks.{block}.resnets"):
            yield f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if f"down_blocks.{block}.downsamplers" in paths:
            yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for block in count("up_blocks"):
        layers = list(count(f"up_blocks.{block}.resnets"))
        for layer in layers:
            attention = f"up_blocks.{block}.attentions.{layer}"
            yield f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0"
            yield attention, f"output_blocks.{number}.1"
            if layer == layers[-1] and f"up_blocks.{block}.upsamplers" in paths:
                place = 2 if attention in paths else 1
                yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{number}.{place}.conv"
            number += 1


def guess_family(modules: Mapping[tuple[str, str], int | None]) -> str:
    """Tell the model family from (component, module name) -> input width, of a LoRA or of a model.

    Stable Diffusion 1.5, 2.x and SDXL differ in the width of the text states; SSD-1B is an SDXL with shorter
    transformers and no attention in the middle block. Motion modules, which see no text, tell nothing.
    """
    names = {(component, module.replace(".", "_")): width for (component, module), width in modules.items()}
    names = {place: width for place, width in names.items() if "motion_modules" not in place[1]}
    for pattern, architecture in ARCHITECTURES:
        if any(re.search(pattern, module) for _, module in modules):
            return architecture
    contexts = Counter(width for (_, name), width in names.items() if width and re.search(r"attn2_to_[kv]$", name))
    if not contexts:
        return _text_family(names)
    width = contexts.most_common(1)[0][0]
    if width == 2048:
        return _xl_family([name for component, name in names if component == "unet"])
    known = {768: "SD 1.5", 1024: "SD 2.x", 1280: "SDXL refiner"}
    return known.get(width, f"a model of text width {width}")


def model_modules(models: Mapping[str, nn.Module]) -> dict[tuple[str, str], int | None]:
    """Return (component, module path) -> input width of models, for `guess_family`."""
    return {
        (component, path): getattr(module, "in_features", None)
        for component, model in models.items()
        for path, module in module_names(model)
    }


def component_of(module: str) -> str:
    """Guess the component of a module name that comes without one."""
    return "text_encoder" if re.search(r"text_model|text_projection|encoder[._]layers", module) else "unet"


def _text_family(names: Mapping[tuple[str, str], int | None]) -> str:
    if any(component == "text_encoder_2" for component, _ in names):
        return f"SDXL{OR}SSD-1B"
    width = next((width for (_, name), width in names.items() if width and name.endswith("q_proj")), None)
    return "SD 2.x" if width == 1024 else "unknown"  # 768 is SD 1.5's encoder and SDXL's first one


def _xl_family(names: Iterable[str]) -> str:
    names = list(names)
    if any(re.search(r"mid_block_attentions_\d|middle_block_1_", name) for name in names):
        return "SDXL"
    pattern = r"(?:down_blocks_2_attentions_[01]|input_blocks_[78]_1)_transformer_blocks_(\d+)"
    deepest = max((int(match[1]) for name in names if (match := re.search(pattern, name))), default=None)
    if deepest is None:
        return f"SDXL{OR}SSD-1B"
    return "SDXL" if deepest > 3 else "SSD-1B"
