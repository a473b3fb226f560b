"""Keys that are in part the same for all heads, as where each token has one rotary key beside the keys of its heads (MLA).

The key operand is read as a function of batch, head, token and feature, through everything that moves or combines elements.
A feature is shared where the head does not occur in it. Proven of an expression, so what cannot be read counts as not shared.
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.analysis.complex import reader
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import cells
from attnopt.analysis.rotary import operand_variables
from attnopt.analysis.site import AttentionSite
from attnopt.ir import expr as E


def annotate(site: AttentionSite, lifter: Lifter) -> None:
    """Write into a site which features of its keys all heads share."""
    found = shared_key_features(site, lifter)
    if found is not None:
        site.spec = site.spec.replace(traits=replace(site.spec.traits, shared_key_features=found))


def shared_key_features(site: AttentionSite, lifter: Lifter) -> tuple[int, int] | None:
    """(start, count) of the features that no head has for itself; None when there are none, or only such, or several runs."""
    out, index = operand_variables(site.k)
    head, feature = out[1], out[3]
    if head is E.ZERO or feature is E.ZERO or not feature.extent or not feature.extent.is_const:
        return None
    parts = cells(lifter.lift(site.k.node, index, reader(lifter, None)), feature)
    shared = [c for c in parts or () if head not in c.value.leaves]
    if parts is None or len(shared) == len(parts):
        return None
    features = sorted(c.first + c.step * i for c in shared for i in range(c.count))
    if not features or features[-1] - features[0] + 1 != len(features):
        return None
    return features[0], len(features)
