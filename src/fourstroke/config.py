"""The configurations of the networks: frozen dataclasses whose fields are those of the published ``config.json`` files.

A field that a network here does not implement is accepted only at the value that leaves it without effect; any other
value raises `UnsupportedConfig`, so that a checkpoint is never run as something that it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar


class UnsupportedConfig(ValueError):
    """A configuration asks for something that Fourstroke does not implement; the message names the field."""


@dataclass(frozen=True)
class Config:
    """What every configuration can do: read like the mapping that it was loaded from."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    class_name: ClassVar[str] = ""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """The field called ``name``, or ``default`` when there is no such field."""
        return getattr(self, name, default)


ConfigT = TypeVar("ConfigT", bound=Config)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Config):
        return {f.name: _thawed(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def config_from_dict(cls: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Build ``cls`` from the mapping in a ``config.json``.

    Keys that begin with an underscore (``_class_name``, ``_diffusers_version``, …) are bookkeeping and are skipped.

    Raises:
        UnsupportedConfig: a field is unknown, or is not implemented and differs from its neutral value.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for name, value in data.items():
        value = _frozen(value)
        if name in known:
            values[name] = value
        elif name.startswith("_"):
            continue
        elif name not in cls.neutral:
            raise UnsupportedConfig(
                f"{cls.class_name}: unknown config field {name!r} (value {value!r}). Known fields: "
                f"{', '.join(sorted(known))}. Remove it from config.json if it has no effect."
            )
        elif cls.neutral[name] and value not in cls.neutral[name]:
            allowed = " or ".join(repr(item) for item in cls.neutral[name])
            raise UnsupportedConfig(
                f"{cls.class_name}: config field {name!r} is {value!r}, which is not supported; only {allowed} is."
            )
    return cls(**values)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The mapping to write as ``config.json``; `config_from_dict` reads it back to an equal configuration."""
    return {"_class_name": config.class_name, **_thawed(config)}


# Marks a field that never changes what the network computes (training and bookkeeping fields of other libraries).
_ANY: tuple[Any, ...] = ()

# Fields that transformers writes into every config.json, whatever the model.
_TRANSFORMERS_FIELDS: Mapping[str, tuple[Any, ...]] = dict.fromkeys(
    (  # noqa: SIM905 - a column of sixty quoted words is no easier to read
        "architectures model_type torch_dtype dtype transformers_version initializer_range initializer_factor dropout "
        "attention_dropout gradient_checkpointing return_dict output_hidden_states output_attentions torchscript "
        "use_bfloat16 tf_legacy_loss pruned_heads tie_word_embeddings is_encoder_decoder is_decoder "
        "cross_attention_hidden_size add_cross_attention tie_encoder_decoder max_length min_length do_sample "
        "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
        "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
        "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task "
        "id2label label2id tokenizer_class prefix sep_token_id decoder_start_token_id task_specific_params "
        "problem_type chunk_size_feed_forward name_or_path attn_implementation"
    ).split(),
    _ANY,
)


@dataclass(frozen=True)
class UNetConfig(Config):
    """Configuration of `UNet2DConditionModel`; the defaults are those of Stable Diffusion's reference layout.

    ``attention_head_dim`` keeps its published meaning: in spite of its name it is the *number of heads* (one value, or
    one a block), unless ``num_attention_heads`` is given.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": _ANY,
        "act_fn": ("silu", "swish"),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "only_cross_attention": (False, (False,) * 4, (False,) * 3),
        "cross_attention_norm": (None,),
        "addition_embed_type_num_heads": _ANY,
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
    }

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise UnsupportedConfig(
                    f"UNet2DConditionModel: {name} has {len(getattr(self, name))} entries, but block_out_channels has "
                    f"{levels}; give one block type a level."
                )
        _one_of(self, "down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
        _one_of(self, "up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"))
        _one_of(self, "mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))
        _one_of(self, "addition_embed_type", (None, "text_time"))
        nested = isinstance(self.transformer_layers_per_block, tuple) and any(
            isinstance(item, tuple) for item in self.transformer_layers_per_block
        )
        if nested and self.reverse_transformer_layers_per_block is None:
            raise UnsupportedConfig(
                "UNet2DConditionModel: transformer_layers_per_block is asymmetric (a list a level), so "
                "reverse_transformer_layers_per_block must give the depths of the up blocks."
            )

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The field ``name`` as one value a level, down the network (a single published value holds for all)."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def _one_of(config: Config, name: str, known: tuple[Any, ...]) -> None:
    """Raise unless the field ``name``, or each item of it, is among ``known``."""
    values = config[name]
    for value in values if isinstance(values, tuple) else (values,):
        if value not in known:
            raise UnsupportedConfig(f"{config.class_name}: {name} {value!r} is not supported; only {known} are.")


@dataclass(frozen=True)
class ControlNetConfig(Config):
    """Configuration of `ControlNetModel`; fields that `UNetConfig` has too mean the same here."""

    class_name: ClassVar[str] = "ControlNetModel"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "act_fn": ("silu", "swish"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "only_cross_attention": (False, (False,) * 4, (False,) * 3),
        "addition_embed_type_num_heads": _ANY,
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
    }

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels:
            raise UnsupportedConfig(
                f"ControlNetModel: down_block_types has {len(self.down_block_types)} entries, but block_out_channels "
                f"has {levels}; give one block type a level."
            )
        _one_of(self, "down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
        _one_of(self, "mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"))
        _one_of(self, "addition_embed_type", (None, "text_time"))
        _one_of(self, "controlnet_conditioning_channel_order", ("rgb", "bgr"))
        for name in ("layers_per_block", "cross_attention_dim"):
            if not isinstance(self[name], int):
                raise UnsupportedConfig(
                    f"ControlNetModel: {name} is {self[name]!r}; it must be one integer for all levels."
                )
        xl = self.addition_embed_type == "text_time"
        if xl and not (self.projection_class_embeddings_input_dim and self.addition_time_embed_dim):
            raise UnsupportedConfig(
                "ControlNetModel: addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim; SDXL has 256 and 2816."
            )

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The field ``name`` as one value a level, down the network (a single published value holds for all)."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


@dataclass(frozen=True)
class MotionAdapterConfig(Config):
    """Configuration of `MotionAdapter`; the defaults are those of AnimateDiff's second version, for SD 1.5.

    ``motion_max_seq_length`` is the number of frames that it has positions for. Published values that are one number
    hold for every level, or for every layer of the mid block.
    """

    class_name: ClassVar[str] = "MotionAdapter"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "conv_in_channels": (None,),
        "motion_activation_fn": ("geglu",),
        "motion_attention_bias": (False,),
        "motion_cross_attention_dim": (None,),
    }

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    motion_layers_per_block: int | tuple[int, ...] = 2
    motion_transformer_layers_per_block: int | tuple[int, ...] = 1
    motion_mid_block_layers_per_block: int = 1
    motion_transformer_layers_per_mid_block: int | tuple[int, ...] = 1
    motion_num_attention_heads: int | tuple[int, ...] = 8
    motion_norm_num_groups: int = 32
    motion_max_seq_length: int = 32
    use_motion_mid_block: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, count in (
            ("motion_layers_per_block", levels),
            ("motion_transformer_layers_per_block", levels),
            ("motion_num_attention_heads", levels),
            ("motion_transformer_layers_per_mid_block", self.motion_mid_block_layers_per_block),
        ):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,) * count
            if len(values) != count or not all(isinstance(item, int) for item in values):
                raise UnsupportedConfig(
                    f"MotionAdapter: {name} is {value!r}; it must be one integer, or {count} of them."
                )

    def per_level(self, name: str) -> tuple[int, ...]:
        """The field ``name`` as one value a level, down the network."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def mid_depths(self) -> tuple[int, ...]:
        """Number of transformer blocks of each motion module in the mid block."""
        value = self.motion_transformer_layers_per_mid_block
        return value if isinstance(value, tuple) else (value,) * self.motion_mid_block_layers_per_block


@dataclass(frozen=True)
class T2IAdapterConfig(Config):
    """Configuration of `T2IAdapter`. A light adapter has one level more than ``channels``, of the last one's width."""

    class_name: ClassVar[str] = "T2IAdapter"

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self) -> None:
        _one_of(self, "adapter_type", ("full_adapter", "full_adapter_xl", "light_adapter"))
        if self.adapter_type == "full_adapter_xl" and len(set(self.channels[2:])) > 1:
            raise UnsupportedConfig(
                f"T2IAdapter: channels is {self.channels}; those of a full_adapter_xl must be equal from the third on."
            )


@dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """Configuration of `AutoencoderKL`. ``scaling_factor`` is 1 / (standard deviation of the latents)."""

    class_name: ClassVar[str] = "AutoencoderKL"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"act_fn": ("silu",), "shift_factor": (None, 0.0)}

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            blocks = getattr(self, name)
            if set(blocks) != {kind} or len(blocks) != len(self.block_out_channels):
                raise UnsupportedConfig(
                    f"AutoencoderKL: {name} is {blocks!r}; it must be {kind!r} once a level "
                    f"({len(self.block_out_channels)} levels)."
                )


@dataclass(frozen=True)
class AutoencoderTinyConfig(Config):
    """Configuration of `AutoencoderTiny` (TAESD layout)."""

    class_name: ClassVar[str] = "AutoencoderTiny"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "upsample_fn": ("nearest",),
        "shift_factor": (0.0, None),
        "block_out_channels": _ANY,
    }

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Configuration of `CLIPTextModel` and `CLIPTextModelWithProjection`, CLIP's and OpenCLIP's text towers."""

    class_name: ClassVar[str] = "CLIPTextModel"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _TRANSFORMERS_FIELDS

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise UnsupportedConfig(f"CLIPTextModel: hidden_act {self.hidden_act!r} is not 'quick_gelu' or 'gelu'.")


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """Configuration of `CLIPVisionModel` and `CLIPVisionModelWithProjection`; pictures and patches are square."""

    class_name: ClassVar[str] = "CLIPVisionModel"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_TRANSFORMERS_FIELDS,
        "pad_token_id": _ANY,
        "bos_token_id": _ANY,
        "eos_token_id": _ANY,
    }

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise UnsupportedConfig(f"CLIPVisionModel: hidden_act {self.hidden_act!r} is not 'quick_gelu' or 'gelu'.")
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise UnsupportedConfig(
                    f"CLIPVisionModel: {name} is {getattr(self, name)!r}; it must be one integer, the side of a square."
                )


@dataclass(frozen=True)
class SafetyCheckerConfig(Config):
    """Configuration of `StableDiffusionSafetyChecker`: CLIP's whole configuration, of which the text part is unused.

    ``projection_dim`` here is the one that counts, not that inside ``vision_config``. ``vision_config_dict`` is an
    older form of ``vision_config`` that wins where a file has both; it is kept as ``vision_config``.
    """

    class_name: ClassVar[str] = "StableDiffusionSafetyChecker"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_TRANSFORMERS_FIELDS,
        "text_config": _ANY,
        "text_config_dict": _ANY,
        "logit_scale_init_value": _ANY,
    }

    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    vision_config_dict: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for given in (self.vision_config or {}, self.vision_config_dict):
            if isinstance(given, Mapping):
                object.__setattr__(self, "vision_config", config_from_dict(CLIPVisionConfig, given))
        object.__setattr__(self, "vision_config_dict", None)
