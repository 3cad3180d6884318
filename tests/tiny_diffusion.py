"""Tiny random diffusion pipelines of diffusers' own classes, and LoTLIP models that fit them, shared by the tests."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import tiny_clip
from lotlip_hf import LoTLIPTextConfig, LoTLIPTextModel, LoTLIPTextModelWithProjection

WIDTH = tiny_clip.SIZE["hidden_size"]
# Pictures of 16 pixels: latents of 8, as the VAE halves once.
SIZE = 16
TOLERANCE = 1e-4  # of pictures from 0 to 1, and of states


def vae(latent_channels: int = 4, **kwargs: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=SIZE,
        **kwargs,
    )


def unet(**kwargs: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": SIZE // 2,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 2,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**{**settings, **kwargs})


def sd(pad_token: str | None = None, **text: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5."""
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=tiny_clip.clip_text_model(**text),
        tokenizer=tiny_clip.clip_tokenizer(**({"pad_token": pad_token} if pad_token else {})),
        unet=unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2() -> StableDiffusionPipeline:
    """Stable Diffusion 2: open_clip's text tower, which pads with another token and has another activation."""
    return sd(pad_token="!", hidden_act="gelu")


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=tiny_clip.clip_text_model(seed=1),
        tokenizer=tiny_clip.clip_tokenizer(),
        text_encoder_2=tiny_clip.clip_text_model(with_projection=True, seed=2, hidden_act="gelu"),
        tokenizer_2=tiny_clip.clip_tokenizer(pad_token="!"),
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + tiny_clip.PROJECTION_DIM,
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in tiny_clip.WORDS)]
    return T5Tokenizer(vocab=[(piece, -float(place)) for place, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=2 * WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config)


def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5),
        text_encoder=tiny_clip.clip_text_model(with_projection=True, seed=1),
        tokenizer=tiny_clip.clip_tokenizer(),
        text_encoder_2=tiny_clip.clip_text_model(with_projection=True, seed=2),
        tokenizer_2=tiny_clip.clip_tokenizer(pad_token="!"),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * tiny_clip.PROJECTION_DIM,
            pos_embed_max_size=SIZE // 2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def flux() -> FluxPipeline:
    return FluxPipeline(
        vae=vae(latent_channels=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=tiny_clip.clip_text_model(),
        tokenizer=tiny_clip.clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


BUILDERS = {"sd": sd, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def pipeline(kind: str) -> DiffusionPipeline:
    """A tiny pipeline of a kind of `BUILDERS`, whose pictures depend on every one of its random weights."""
    torch.manual_seed(0)
    return _random(BUILDERS[kind]())


def unclip(clip: CLIPModel) -> StableUnCLIPImg2ImgPipeline:
    """A tiny Stable unCLIP that reads the embeddings of a CLIP's image tower."""
    tower = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    tower.load_state_dict({name: one for name, one in clip.state_dict().items() if name.startswith("vis")})
    pipe = StableUnCLIPImg2ImgPipeline(
        feature_extractor=tiny_clip.image_processor(),
        image_encoder=tower,
        image_normalizer=StableUnCLIPImageNormalizer(tiny_clip.PROJECTION_DIM),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tiny_clip.clip_tokenizer(),
        text_encoder=tiny_clip.clip_text_model(),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * tiny_clip.PROJECTION_DIM),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=vae(),
    )
    return _random(pipe)


def _random(pipe: Any) -> Any:
    """Random weights of what is not random yet."""
    for seed, name in enumerate(("unet", "transformer", "vae", "text_encoder_3")):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            tiny_clip.random_weights(getattr(pipe, name), seed)
            getattr(pipe, name).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(
    pipe: DiffusionPipeline, prompt: str | list[str] | None = "a photo of a cat", **kwargs: Any
) -> torch.Tensor:
    """[B, SIZE, SIZE, 3], two steps from the same noise each time."""
    settings = {
        "num_inference_steps": 2,
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    if pipe.components.get("text_encoder_2") is not None and "transformer" in pipe.components:
        settings["max_sequence_length"] = 16
    return torch.from_numpy(pipe(prompt, **{**settings, **kwargs}).images)


def same(first: torch.Tensor, second: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """
    Whether two pictures, or hidden states, are of equal weights and prompts. Rounding, which differs with the CPU and
    the addresses of the weights, makes less than 1e-5; another word of a prompt makes more than 1e-3.
    """
    return torch.allclose(first, second, rtol=0, atol=tolerance)


def lotlip(
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
) -> LoTLIPTextModel | LoTLIPTextModelWithProjection:
    """A LoTLIP with corner tokens around the weights of a CLIP text encoder."""
    projection = getattr(encoder, "text_projection", None)
    config = LoTLIPTextConfig(
        backbone_config=encoder.config.to_dict(), projection_dim=projection.out_features if projection else None
    )
    model = (LoTLIPTextModelWithProjection if projection else LoTLIPTextModel)(config).eval()
    tower = model.text_model if projection else model
    tower.backbone.load_state_dict((encoder.text_model if projection else encoder).state_dict())
    if projection:
        model.text_projection.load_state_dict(projection.state_dict())
    return model


def save(folder: Any, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A checkpoint folder with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
