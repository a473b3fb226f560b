"""AO9xx: what went wrong."""

from __future__ import annotations

from attnopt.remarks.page import Page, script

_KERNEL = "import torch\nfrom torch import nn\n\nimport attnopt\nfrom attnopt.kernels.registry import Backend, find, register\n\n\n"
_PASS = """\
from unittest import mock

import torch
from torch import nn

import attnopt
from attnopt.passes.base import PassResult
from attnopt.passes.cleanup import Cleanup


"""

ERRORS: dict[str, Page] = {
    "AO901": Page(
        title="a site was put back",
        text="The optimized attention differs from the original by more than the budget, so the original form is back in place; the rest stays optimized.",
        cause="The kernel that was chosen is wrong for this attention: a bug in it, or in what was lifted.",
        hint="Please report it with the model; another --backend may be right.",
        example=script(
            """
            def twice(*operands):
                return 2 * find("reference").run(*operands)


            register(Backend("twice", available=lambda: None, accepts=lambda *_: None, why=lambda *_: "a wrong kernel", run=twice))


            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return (q @ k.mT * 0.25).softmax(-1) @ v  # <- here


            q, k, v = torch.randn(3, 2, 9, 16)
            config = attnopt.OptimizeConfig(backend="twice")
            report = attnopt.optimize(Attention(), (q, k, v), config=config).attnopt_report
            """,
            _KERNEL,
        ),
    ),
    "AO902": Page(
        title="verification failed",
        text="The optimized model differs from the original by more than the budget, and putting attentions back does not help. It must not be used.",
        cause="A pass changed what the model computes outside of an attention: a bug in it.",
        hint="Please report it with the model; --disable-pass shows which pass it is.",
        example=script(
            """
            class Model(nn.Module):
                def forward(self, q, k, v):
                    return ((q @ k.mT * 0.25).softmax(-1) @ v).relu()


            def wrong(self, module):
                for node in module.graph.nodes:
                    if node.target is torch.ops.aten.relu.default:
                        node.target = torch.ops.aten.neg.default
                return PassResult(True)


            q, k, v = torch.randn(3, 2, 9, 16)
            with mock.patch.object(Cleanup, "run", wrong):
                report = attnopt.optimize(Model(), (q, k, v)).attnopt_report
            """,
            _PASS,
        ),
    ),
}
