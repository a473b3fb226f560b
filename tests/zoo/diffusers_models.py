"""Blocks of image generators of the diffusers library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.case import Case, Facts
from zoo.data import generator, padding


def _quiet() -> Any:
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return diffusers


def _spelled(model: Any, form: str) -> nn.Module:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor() if form == "eager" else AttnProcessor2_0())
    made: nn.Module = model.eval()
    return made


def _unet(form: str) -> nn.Module:
    d = _quiet()
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return _spelled(
        d.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8, **blocks
        ),
        form,
    )


def _dit(form: str) -> nn.Module:
    d = _quiet()
    return _spelled(d.DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=20), form)


def _pixart(form: str) -> nn.Module:
    d = _quiet()
    return _spelled(
        d.PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            sample_size=8,
            cross_attention_dim=64,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        form,
    )


def _sd3(form: str) -> nn.Module:
    d = _quiet()
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
    }
    model: nn.Module = d.SD3Transformer2DModel(num_layers=2, attention_head_dim=16, num_attention_heads=4, qk_norm="rms_norm", **sizes)
    return model.eval()


def _flux(form: str) -> nn.Module:
    d = _quiet()
    model: nn.Module = d.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model.eval()


def _latents(b: int, channels: int = 4) -> Tensor:
    return torch.randn(b, channels, 8, 8, generator=generator(b))


def _captions(b: int, n: int = 12) -> Tensor:
    return torch.randn(b, n, 32, generator=generator(b, n))


def _steps(b: int) -> Tensor:
    return torch.arange(b) * 7 + 3


def _unet_inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    more = {"encoder_attention_mask": padding(b, 12).bool()} if padded else {}
    return {"sample": _latents(b), "timestep": _steps(b), "encoder_hidden_states": _captions(b), "return_dict": False, **more}


def _dit_inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {"hidden_states": _latents(b), "timestep": _steps(b), "class_labels": torch.arange(b), "return_dict": False}


def _pixart_inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    more = {"encoder_attention_mask": padding(b, 12).bool()} if padded else {}
    return {
        "hidden_states": _latents(b),
        "encoder_hidden_states": _captions(b),
        "timestep": _steps(b),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
        **more,
    }


def _sd3_inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    return {
        "hidden_states": _latents(b),
        "encoder_hidden_states": _captions(b),
        "pooled_projections": _captions(b)[:, 0],
        "timestep": _steps(b),
        "return_dict": False,
    }


def _flux_inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
    grid = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1)
    return {
        "hidden_states": torch.randn(b, 16, 16, generator=generator(b)),
        "encoder_hidden_states": _captions(b),
        "pooled_projections": _captions(b)[:, 0],
        "timestep": _steps(b) / 1000,
        "img_ids": grid,
        "txt_ids": torch.zeros(12, 3),
        "return_dict": False,
    }


FUSED = ("sdpa",)
# They hide padding by adding -10000, which real scores may come close to: a number, not a hidden key.
_BIASED: Facts = {"key_padding": False, "bias": lambda bias: True}


def _case(name: str, build: Any, inputs: Any, sites: int, **more: Any) -> Case:
    return Case(f"df_{name}", "diffusers", build, inputs, sites, open="b", **more)


CASES = [
    _case("unet", _unet, _unet_inputs, 8, padded_sites="attn2", expect={"attn2": _BIASED}),
    _case("dit", _dit, _dit_inputs, 2, padded=False),
    _case("pixart", _pixart, _pixart_inputs, 4, padded_sites="attn2", expect={"attn2": _BIASED}),
    _case("sd3", _sd3, _sd3_inputs, 2, padded=False, forms=FUSED),
    _case("flux", _flux, _flux_inputs, 2, padded=False, forms=FUSED),
]
