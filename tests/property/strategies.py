"""Random programs. Simple values come first everywhere, so that a failing program shrinks to the plainest one."""

from __future__ import annotations

from hypothesis import strategies as st

from property import biases as b
from property import masks as m
from property import steps as s
from property.emit import Sizes
from property.program import Call, Program
from property.program import Softmax as SoftmaxName

SINKS = True
"""A logit that takes weight and has no value."""

ALIGN = ("top_left", "top_left", "bottom_right")


@st.composite
def diagonals(draw: st.DrawFn, near: bool, slanted: bool) -> m.Diagonal:
    align = draw(st.sampled_from(ALIGN)) if slanted else "top_left"
    spelling = draw(st.sampled_from(("arange", "flipped", "difference", "triangle", "complement", "cumsum", "buffer")))
    if not near:
        return m.Diagonal(align=align, spelling=spelling)
    wrong = draw(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4))) if spelling == "buffer" else None
    return m.Diagonal(draw(st.sampled_from(("<=", "<", ">=", ">"))), draw(st.integers(-2, 2)), align, spelling, wrong)


@st.composite
def windows(draw: st.DrawFn, slanted: bool) -> m.Window:
    left, right = draw(st.sampled_from(((2, 2), (1, 1), (2, 0), (3, None), (None, 1), (1, 2), (0, 0))))
    align = draw(st.sampled_from(ALIGN)) if slanted else "top_left"
    return m.Window(left, right, align, draw(st.sampled_from(("arange", "difference", "abs", "band", "strict"))))


@st.composite
def atoms(draw: st.DrawFn, square: bool, slanted: bool, near: bool, heads: int) -> m.Mask:
    kind = draw(st.sampled_from(("causal", "causal", "causal", "window", "window", "padding", "padding", "document", "prefix", "chunk", "global", "stride", "heads")))
    if kind == "causal":
        return draw(diagonals(near, slanted))
    if kind == "window":
        return draw(windows(slanted))
    if kind == "padding":
        return m.Padding(draw(st.sampled_from(("bool", "hidden", "long", "nonzero", "positive", "is one"))), "q" if near and draw(st.booleans()) else "k")
    if kind == "document":
        if not square:
            return m.Document("two tensors")
        return m.Document(draw(st.sampled_from(("eq", "not ne", *(("earlier",) if near else ())))))
    if kind == "prefix":
        return m.Joined("or", draw(diagonals(near, slanted)), m.Below(draw(st.sampled_from((2, 3, None)))))
    if kind == "chunk":
        return m.Chunk(draw(st.integers(2, 3)), draw(st.sampled_from(("==", "<=") if near else ("==",))), draw(st.sampled_from(ALIGN)) if slanted else "top_left", draw(st.sampled_from(("//", "div", "minus"))))
    if kind == "global":
        return m.Joined("or", draw(windows(slanted)), m.Joined("or", m.Below(1), m.Below(draw(st.integers(1, 2)), "q")))
    if kind == "stride":
        return m.Joined("or", m.Stride(draw(st.integers(2, 3))), draw(windows(slanted)))
    return m.Joined("or", m.Heads(1 if heads > 1 else 0), draw(windows(slanted)))


@st.composite
def masks(draw: st.DrawFn, square: bool, slanted: bool, heads: int) -> m.Mask:
    near = draw(st.integers(0, 3)) == 3
    out = draw(atoms(square, slanted, near, heads))
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        how = draw(st.sampled_from(("and", "and", "and", "or", "xor")))
        spelling = draw(st.sampled_from(("operator", "logical", "bitwise", *(("number",) if how != "xor" else ()))))
        other = draw(atoms(square, slanted, near, heads))
        if how == "xor" and {type(x) for x in other.parts()} & {type(x) for x in out.parts()}:
            how = "or"  # of one thing with itself nothing would be left
        out = m.Joined(how, out, other, spelling)
    if near and draw(st.booleans()):
        out = m.Joined("xor", out, m.Entry(draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))))
    if draw(st.integers(0, 5)) == 5:
        out = m.Not(m.Not(out, "logical"), draw(st.sampled_from(("~", "logical", "== False"))))
    return out


@st.composite
def hides(draw: st.DrawFn, square: bool, slanted: bool, heads: int, half: bool, call: bool = False, double: bool = False) -> s.Hide:
    mask = draw(masks(square, slanted, heads))
    fill = draw(st.sampled_from(("-inf", "-inf", "smallest", "smallest", *(() if half else ("-1e9",)), "-1e4")))
    spellings = ["masked_fill", "where", "add filled"]
    if not (double and fill == "smallest"):  # torch.where of two numbers is float32
        spellings.append("add where")
    if fill != "-inf":
        spellings += ["one minus", "add one minus"]
    if not call:
        spellings += ["in place"] + (["multiplied"] if fill != "-inf" else [])
    return s.Hide(mask, fill, draw(st.sampled_from(spellings)))


@st.composite
def added(draw: st.DrawFn, H: int, fixed: bool) -> s.Add:
    kind = draw(st.sampled_from(("slopes", "slopes", "slopes", "table", "table", "learned", "given", "row")))
    bias: b.Bias
    if kind == "slopes":
        bias = b.Slopes(draw(st.sampled_from(("relative", "key", "distance", "count", "query minus key", "square"))), draw(st.sampled_from(("buffer", "computed", "parameter"))))
    elif kind == "table":
        bias = b.Table(draw(st.sampled_from(("distance", "size", "logarithm"))), draw(st.sampled_from(("index", "embedding", "gather"))))
    elif kind == "learned":
        bias = b.Learned(draw(st.booleans()))
    elif kind == "row":
        bias = b.Row()
    else:
        bias = b.Given(draw(st.sampled_from((("B", H, "S", "T"), ("S", "T"), (H, "S", "T"), (1, H, 1, "T"), ("B", 1, "S", "T"), ("B", 1, 1, "T")))))
    return s.Add(bias, draw(st.sampled_from(("+", "-", "reversed"))))


@st.composite
def steps(draw: st.DrawFn, square: bool, slanted: bool, H: int, half: bool, double: bool) -> tuple[s.Step, ...]:
    out: list[s.Step] = []
    for kind in draw(st.lists(st.sampled_from(("scale", "scale", "hide", "hide", "hide", "add", "softcap", "clamp", "temperature", "head scale", "given", "island", "no nan")), max_size=5)):
        if kind == "scale":
            out.append(s.Scale(draw(st.sampled_from((0.5, 0.3, 0.125, 2.0))), draw(st.sampled_from(("mul", "div", "in place")))))
        elif kind == "hide":
            hide = draw(hides(square, slanted, H, half and not any(isinstance(x, s.Island) for x in out), double=double))
            if hide.spelling == "multiplied" and any(isinstance(x, s.Hide) for x in out):  # 0 * -inf
                hide = s.Hide(hide.mask, hide.fill)
            out.append(hide)
        elif kind == "add":
            out.append(draw(added(H, False)))
        elif kind == "softcap":
            out.append(s.Softcap(draw(st.sampled_from((5.0, 2.0))), draw(st.sampled_from(("div", "mul")))))
        elif kind == "clamp":
            out.append(s.Clamp(*draw(st.sampled_from(((-3.0, 3.0), (None, 2.0), (-2.0, None))))))
        elif kind == "temperature":
            out.append(s.Temperature(draw(st.sampled_from(("computed", "learned", "divided")))))
        elif kind == "head scale":
            out.append(s.HeadScale())
        elif kind == "given":
            out.append(s.Given(draw(st.sampled_from(("keys", "keys", "queries")))))
        elif kind == "island":
            out.append(s.Island())
        else:
            out.append(s.NoNan())
    return tuple(out)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    source = draw(st.sampled_from(("inputs", "inputs", "sequence first", "linear", "linear", "linear cross", "packed unbind", "packed split", "packed select", "past", "keys transposed", "learned queries")))
    H, Hkv = draw(st.sampled_from(((2, 2), (2, 2), (4, 2), (4, 1), (6, 2), (1, 1), (3, 3))))
    packed = source.startswith("packed")
    if packed:
        Hkv = H
    D = draw(st.sampled_from((4, 3, 8)))
    Dv = D if packed else draw(st.sampled_from((D, D, 5)))
    S = draw(st.sampled_from((5, 6, 7)))
    T = S
    if source in ("inputs", "sequence first", "linear cross", "keys transposed", "learned queries"):
        T = draw(st.sampled_from((S, S + 3, 9, 5)))
    elif source == "past":
        T = S + draw(st.integers(2, 4))
    if Hkv == H:
        heads = "same"
    else:
        heads = draw(st.sampled_from(("repeat_interleave", "expand", "tiled", "grouped", *(("broadcast",) if Hkv == 1 else ()))))
    return {
        "dtype": draw(st.sampled_from(("float32", "float32", "float32", "float64", "bfloat16", "float16"))), "sizes": Sizes(draw(st.sampled_from((2, 3, 1))), S, T), "dynamic": draw(st.booleans()),
        "source": source, "heads": heads, "H": H, "Hkv": Hkv, "D": D, "Dv": Dv, "norm": draw(st.sampled_from(("none", "none", "none", "rms", "l2"))),
        "q_scale": draw(st.sampled_from((1.0, 1.0, 0.5, 0.25))), "k_scale": draw(st.sampled_from((1.0, 1.0, 1.0, 0.7))), "output": draw(st.sampled_from(("heads", "merged"))),
        "dropout": draw(st.sampled_from(("none", "none", "function", "module"))),
    }  # fmt: skip


SOFTMAXES: tuple[SoftmaxName, ...] = ("softmax", "F.softmax", "method", "axis", "in float32", "exp over sum", "exp minus max", "divide after", "log_softmax", "logsumexp")
LAYOUTS = ("matmul", "mT", "einsum", "keys first", "multiply and sum", "flat", "flat product", "baddbmm", "heads last", "softmax over rows")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program of the supported language."""
    shape = draw(shapes())
    sizes, H, half = shape["sizes"], shape["H"], shape["dtype"] in ("float16", "bfloat16")
    assert isinstance(sizes, Sizes) and isinstance(H, int)
    square = shape["source"] not in ("past", "learned queries", "linear cross") and sizes.S == sizes.T
    slanted = sizes.T >= sizes.S and not square
    if draw(st.integers(0, 4)) == 4:
        return draw(calls(shape, square, slanted, half))
    done = draw(steps(square, slanted, H, half, shape["dtype"] == "float64"))
    layout = "matmul" if shape["heads"] == "grouped" else draw(st.sampled_from(LAYOUTS))
    if shape["heads"] == "broadcast" and layout in ("einsum", "heads last"):
        layout = "mT"
    sink = draw(st.sampled_from(("none", "none", "none", "joined", "joined minus max", "plus one", "padded"))) if SINKS and layout in ("matmul", "mT", "einsum") and shape["heads"] != "grouped" else "none"
    softmax = draw(st.sampled_from(SOFTMAXES)) if sink == "none" else "softmax"
    product = draw(st.sampled_from(("matmul", "einsum", "transposed")))
    if shape["heads"] == "broadcast" and product == "einsum":
        product = "matmul"
    if softmax == "divide after" and half and any(isinstance(x, s.Island) for x in done):
        softmax = "exp minus max"  # float32 exponentials and half precision values do not multiply
    nan = softmax != "divide after" and draw(st.integers(0, 5)) == 5
    return Program(**shape, layout=layout, steps=done, softmax=softmax, sink=sink, product=product, nan_to_num=nan)  # type: ignore[arg-type]


@st.composite
def calls(draw: st.DrawFn, shape: dict[str, object], square: bool, slanted: bool, half: bool) -> Program:
    """A program around an existing attention call."""
    H = shape["H"]
    assert isinstance(H, int)
    if shape["heads"] in ("grouped", "broadcast"):
        shape["heads"] = "repeat_interleave"
    if shape["heads"] == "repeat_interleave" and draw(st.booleans()):
        shape["heads"] = "enable_gqa"
    mask = draw(st.sampled_from(("none", "bool", "bool", "float", "float")))
    is_causal = mask == "none" and draw(st.booleans())
    done: tuple[s.Step, ...] = ()
    if mask == "bool":
        done = tuple(draw(st.lists(hides(square, slanted, H, half, True, shape["dtype"] == "float64"), min_size=1, max_size=2)))
        done = tuple(s.Hide(x.mask) for x in done)
    elif mask == "float":
        done = tuple(draw(st.lists(st.one_of(hides(square, slanted, H, half, True, shape["dtype"] == "float64"), added(H, False)), min_size=1, max_size=3)))
    return Program(**shape, steps=done, call=Call(mask, is_causal, draw(st.sampled_from((None, None, 0.3, 1.0)))))  # type: ignore[arg-type]
