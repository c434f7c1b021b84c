"""What diffusers offers for Stable Diffusion and Fourstroke does not, and what to do instead; see ``docs/compat.md``.

One table for names that are imported from the package and one for members of pipelines; a test holds both against
diffusers, so that each of its names is either here or there.
"""

from __future__ import annotations

from collections.abc import Mapping

PAGE = "docs/compat.md"


def _each(*groups: tuple[str, str]) -> dict[str, str]:
    """Name -> what to do instead, from pairs of names and that."""
    return {name: instead for names, instead in groups for name in names.split()}


NAMES: Mapping[str, str] = _each(
    (
        "StableDiffusionPAGPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline "
        "StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPAGInpaintPipeline StableDiffusionXLPAGPipeline "
        "StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline "
        "StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline AnimateDiffPAGPipeline",
        "perturbed-attention guidance does not go with few steps; use the pipeline of the same name without PAG",
    ),
    (
        "StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetUnionImg2ImgPipeline "
        "StableDiffusionXLControlNetUnionInpaintPipeline ControlNetUnionModel",
        "use a list of ControlNetModels, one a kind of control",
    ),
    (
        "StableDiffusionControlNetXSPipeline StableDiffusionXLControlNetXSPipeline ControlNetXSAdapter "
        "UNetControlNetXSModel AnimateDiffSparseControlNetPipeline SparseControlNetModel",
        "use a ControlNetModel with the ControlNet pipelines, or a T2IAdapter",
    ),
    (
        "StableDiffusionUpscalePipeline StableDiffusionLatentUpscalePipeline OnnxStableDiffusionUpscalePipeline",
        "enlarge the picture with PIL and repaint it at a low strength with an image-to-image pipeline",
    ),
    (
        "StableDiffusionInstructPix2PixPipeline StableDiffusionXLInstructPix2PixPipeline "
        "StableDiffusionDiffEditPipeline StableDiffusionPix2PixZeroPipeline StableDiffusionModelEditingPipeline "
        "CycleDiffusionPipeline PaintByExamplePipeline",
        "edit pictures with the image-to-image and inpainting pipelines, ControlNets and IP-Adapters",
    ),
    (
        "StableDiffusionDepth2ImgPipeline StableDiffusionLDM3DPipeline",
        "steer by depth with a ControlNet or a T2I-Adapter for depth",
    ),
    (
        "StableDiffusionGLIGENPipeline StableDiffusionGLIGENTextImagePipeline StableDiffusionAttendAndExcitePipeline "
        "StableDiffusionSAGPipeline StableDiffusionPanoramaPipeline StableDiffusionParadigmsPipeline "
        "SemanticStableDiffusionPipeline",
        "use StableDiffusionPipeline",
    ),
    (
        "StableDiffusionImageVariationPipeline StableUnCLIPPipeline StableUnCLIPImg2ImgPipeline "
        "BlipDiffusionPipeline BlipDiffusionControlNetPipeline",
        "show the model a picture with load_ip_adapter() and ip_adapter_image=",
    ),
    (
        "OnnxStableDiffusionPipeline OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline "
        "StableDiffusionOnnxPipeline OnnxRuntimeModel",
        "use the pipelines of torch",
    ),
    (
        "PIAPipeline I2VGenXLPipeline StableVideoDiffusionPipeline TextToVideoSDPipeline TextToVideoZeroPipeline "
        "TextToVideoZeroSDXLPipeline UNet3DConditionModel UNetSpatioTemporalConditionModel I2VGenXLUNet "
        "AutoencoderKLTemporalDecoder",
        "animate with AnimateDiffPipeline or AnimateDiffVideoToVideoPipeline",
    ),
    (
        "StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline "
        "StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3PAGPipeline "
        "StableDiffusion3PAGImg2ImgPipeline StableDiffusion3ModularPipeline StableDiffusionXLModularPipeline "
        "StableCascadeCombinedPipeline StableCascadeDecoderPipeline StableCascadePriorPipeline",
        "only Stable Diffusion 1.5, 2.x, SDXL and SSD-1B are run, by their own pipelines",
    ),
    (
        "UNetMotionModel",
        "give AnimateDiffPipeline a UNet2DConditionModel and a MotionAdapter; folders with a UNetMotionModel load too",
    ),
    ("AsymmetricAutoencoderKL ConsistencyDecoderVAE VQModel", "use AutoencoderKL or AutoencoderTiny"),
    ("UNet2DModel UNet1DModel Transformer2DModel AutoModel", "use UNet2DConditionModel, or the network's own class"),
    ("SchedulerMixin", "any object with the scheduler's methods works; fourstroke.schedulers.Scheduler is a base"),
    (
        "DDIMInverseScheduler DPMSolverMultistepInverseScheduler DDIMParallelScheduler DDPMParallelScheduler "
        "RePaintScheduler EDMDPMSolverMultistepScheduler CosineDPMSolverMultistepScheduler SASolverScheduler "
        "IPNDMScheduler CMStochasticIterativeScheduler KarrasVeScheduler ScoreSdeVeScheduler VQDiffusionScheduler "
        "UnCLIPScheduler FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler FlowMatchLCMScheduler",
        "use LCMScheduler, or DPMSolverMultistepScheduler, EulerDiscreteScheduler or DDIMScheduler",
    ),
)

_INSIDE = "it is a part of the pipeline's inside; arguments are checked by GenerateRequest, and denoise.py has the loop"
_CONFIG = (
    "read pipe.components and pipe.settings; save_pretrained() writes model_index.json, from_pretrained() reads it"
)
_LORA = "use load_lora_weights(), and fourstroke.lora for what is in a file"

MEMBERS: Mapping[str, str] = _each(
    (
        "check_image check_inputs decode_latents encode_video get_guidance_scale_embedding get_timesteps "
        "prepare_conditioning_frames prepare_control_image prepare_extra_step_kwargs prepare_image prepare_latents "
        "prepare_mask_latents prepare_video progress_bar run_safety_checker",
        _INSIDE,
    ),
    (
        "config config_name extract_init_dict from_config get_config_dict has_compatibles ignore_for_config "
        "load_config name_or_path parameters register_for_auto_class register_modules register_to_config save_config "
        "to_json_file to_json_string",
        _CONFIG,
    ),
    ("load_lora_into_text_encoder load_lora_into_unet lora_state_dict", _LORA),
    (
        "pack_weights text_encoder_name unet_name write_lora_layers",
        "save_lora_weights(folder, name) writes a LoRA that is loaded",
    ),
    (
        "load_textual_inversion unload_textual_inversion maybe_convert_prompt",
        "textual inversions are not read; pass prompt_embeds, or use a LoRA",
    ),
    (
        "enable_group_offload hf_device_map model_cpu_offload_seq",
        "use enable_model_cpu_offload(), which moves one network at a time",
    ),
    ("numpy_to_pil", 'ask for output_type="pil", or use fourstroke.images.postprocess'),
    ("push_to_hub", "save_pretrained(folder), then huggingface_hub.upload_folder(…)"),
)
