"""A site's sizes, and what a mask is called in them."""

from __future__ import annotations

from attnopt.analysis import masks
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Dims

D = Dims(B=E.sym("B"), Hq=E.const(4), Hkv=E.const(4), Sq=E.sym("S"), Skv=E.sym("T"), D=E.const(8), Dv=E.const(8))
BASE = D.all


def seen(mask: Expr) -> masks.Seen:
    return masks.read(mask, D)


def padding(slot: int = 0) -> Expr:
    return E.load(slot, (D.b, D.k), "bool")
