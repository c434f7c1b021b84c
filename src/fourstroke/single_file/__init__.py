"""Checkpoints in one file, in the layout of Stability's own code: recognised, configured, renamed, loaded.

Such a file carries no configuration and no tokenizer; both are shipped. Names are translated by tables that are derived
from the configuration; a tensor that no table knows is an error, unless `IGNORED` says why it carries nothing. Tensors
stay in the memory-mapped file; only where the layouts differ in shape does a small function adapt them.
"""

from .assets import clip_tokenizer, clip_vocabulary, config_folder, families
from .detect import IGNORED, SingleFile, infer_family, infer_prediction_type
from .load import load_controlnet_file, load_network_file, load_single_file, load_unet_file, load_vae_file

__all__ = [
    "IGNORED",
    "SingleFile",
    "clip_tokenizer",
    "clip_vocabulary",
    "config_folder",
    "families",
    "infer_family",
    "infer_prediction_type",
    "load_controlnet_file",
    "load_network_file",
    "load_single_file",
    "load_unet_file",
    "load_vae_file",
]
