"""Models of the vit-pytorch library.

Its ``__init__`` imports torchvision, which the models do not need and which does not load beside every build of torch; so the
models' own files are imported without it.
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import distribution
from typing import Any

import torch
from torch import nn

from zoo.case import LENGTH, Case, Facts, Refusal, some
from zoo.data import generator

_VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128, "dim_head": 16}


def _module(name: str) -> Any:
    if "vit_pytorch" not in sys.modules:
        package = types.ModuleType("vit_pytorch")
        package.__path__ = [str(distribution("vit-pytorch").locate_file("vit_pytorch"))]
        sys.modules["vit_pytorch"] = package
    return importlib.import_module(f"vit_pytorch.{name}")


# torch.export keeps a batch of one apart in these.
SEVERAL = ((3, LENGTH), (5, LENGTH))


def _case(
    name: str,
    cls: str,
    sites: int,
    facts: Facts | None = None,
    *,
    argument: str = "img",
    size: int = 32,
    refusals: dict[str, Refusal] | None = None,
    forms: tuple[str, ...] = ("eager",),
    other: tuple[tuple[int, int], ...] = Case.other,
    **options: Any,
) -> Case:
    def build(form: str) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(_module(name), cls)(**options)
        return made.eval()

    def inputs(padded: bool, b: int, s: int) -> dict[str, Any]:
        return {argument: torch.randn(b, 3, size, size, generator=generator(b))}

    return Case(f"vp_{name}", "vit-pytorch", build, inputs, sites, {"": facts or {}}, forms, padded=False, open="b", refusals=refusals or {}, other=other)


_PYRAMID: dict[str, Any] = {"dim": (16, 32, 32, 32), "depth": (1, 1, 1, 1), "num_classes": 10}
_MIXED = Refusal("AO204", "the probabilities of one head are mixed with those of others before they meet the values")
# The bias is a learnt table, read through a table of indices: a buffer, and small.
_TABLE: Facts = {"bias": some, "dense": lambda loads: loads <= 1}
CASES = [
    _case("vit", "ViT", 2, **_VIT),
    _case("simple_vit", "SimpleViT", 2, other=SEVERAL, **_VIT),
    _case("simple_vit_with_qk_norm", "SimpleViT", 2, other=SEVERAL, **_VIT),
    # its other form does not run: the library lost an import there
    _case("simple_flash_attn_vit", "SimpleViT", 2, forms=("sdpa",), **_VIT),
    # a patch does not see itself, and the temperature is learnt
    _case("vit_for_small_dataset", "ViT", 2, {"rest": "not q == k"}, **_VIT),
    _case(
        "cross_vit",
        "CrossViT",
        4,
        other=SEVERAL,
        image_size=48,
        size=48,
        num_classes=10,
        depth=1,
        sm_dim=32,
        sm_patch_size=12,
        sm_enc_depth=1,
        sm_enc_heads=2,
        sm_enc_mlp_dim=64,
        sm_enc_dim_head=16,
        lg_dim=48,
        lg_patch_size=16,
        lg_enc_depth=1,
        lg_enc_heads=2,
        lg_enc_mlp_dim=64,
        lg_enc_dim_head=16,
        cross_attn_depth=1,
        cross_attn_heads=2,
        cross_attn_dim_head=16,
    ),
    _case(
        "crossformer",
        "CrossFormer",
        7,  # and a softmax over a single position, which mixes nothing
        _TABLE,
        argument="x",
        size=64,
        **{**_PYRAMID, "dim": (32, 64, 64, 64)},
        global_window_size=(4, 2, 2, 1),
        local_window_size=2,
        cross_embed_strides=(4, 2, 2, 2),
    ),
    _case(
        "levit",
        "LeViT",
        5,
        _TABLE,
        size=128,
        image_size=128,
        num_classes=10,
        dim=(32, 48, 64),
        depth=1,
        heads=(2, 3, 4),
        mlp_mult=2,
        dim_key=8,
        dim_value=16,
    ),
    _case("max_vit", "MaxViT", 4, _TABLE, argument="x", size=32, num_classes=10, dim=32, depth=(1, 1), dim_head=16, window_size=4, dim_conv_stem=16),
    # the head of its classification pools with weights that come from a projection alone: no attention
    _case(
        "cct",
        "CCT",
        2,
        argument="x",
        img_size=32,
        embedding_dim=64,
        n_conv_layers=1,
        kernel_size=3,
        stride=2,
        padding=1,
        num_layers=2,
        num_heads=4,
        mlp_ratio=2.0,
        num_classes=10,
    ),
    # two of its four softmaxes mix channels, which is no attention over positions
    _case("xcit", "XCiT", 1, image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, cls_depth=1, heads=4, mlp_dim=128, dim_head=16),
    _case(
        "cait",
        "CaiT",
        2,
        other=SEVERAL,
        refusals={"": _MIXED},
        image_size=32,
        patch_size=8,
        num_classes=10,
        dim=64,
        depth=1,
        cls_depth=1,
        heads=4,
        mlp_dim=128,
        dim_head=16,
    ),
    _case(
        "deepvit",
        "DeepViT",
        1,
        refusals={"": _MIXED},
        **{**_VIT, "depth": 1},
    ),
]
