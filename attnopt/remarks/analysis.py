"""AO3xx: what analysis and capture found out."""

from __future__ import annotations

from attnopt.remarks.page import Page, script

ANALYSIS: dict[str, Page] = {
    "AO301": Page(
        title="a dimension was specialised",
        text="The captured graph holds for one size (or some sizes) of this dimension only; another size captures the model again, which takes time and a variant.",
        cause="The model's own code turned the size into a Python number, compared it with one, or added a tensor of that fixed size.",
        hint="Write the code at the source line for any size; x.shape[1] in torch.arange, view and expand stays open. Without a source line: look for constant sizes.",
        example=script("""
            class Fixed(nn.Module):
                def forward(self, x):
                    length = int(x.shape[1])  # <- here
                    x = x + torch.ones(length, 16)
                    return (x @ x.mT * 0.25).softmax(-1) @ x


            report = attnopt.optimize(Fixed(), torch.randn(2, 9, 16)).attnopt_report
        """),
    ),
    "AO302": Page(
        title="captured by torch.compile",
        text="The model is optimized when it runs, by torch.compile, function by function; each compiled function is analysed on its own.",
        cause="torch.export does not take this model (it branches on values, for instance), no inputs were given, or capture='dynamo' was asked for.",
        hint="Nothing, if every attention was replaced. To export the model, write branches on values with torch.where or torch.cond.",
        example=script("""
            class Gated(nn.Module):
                def forward(self, x):
                    y = (x @ x.mT * 0.25).softmax(-1) @ x
                    return y if y.sum() > 0 else -y  # <- here


            report = attnopt.optimize(Gated(), torch.randn(2, 9, 16)).attnopt_report
        """),
    ),
    "AO303": Page(
        title="a part of the score is a dense tensor",
        text="A part of the score or the mask could not be expressed by indices; it is read from memory for each query and key. That is right, only slower.",
        cause="The tensor is an input of the model, a parameter, or was made by an operator without a formula in batch, head, query and key. "
        "Nothing is known of its values, so no block can be skipped.",
        hint="Make the tensor in the model from torch.arange, comparisons and lengths, or index a small table with them; then it is computed in the kernel.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v, bias):
                    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v  # <- here


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v, torch.randn(9, 9))).attnopt_report
        """),
    ),
    "AO304": Page(
        title="unverified",
        text="The optimized model was not compared with the original.",
        cause="It was switched off (verify=False), the weights are on the meta device, or the model was compiled just in time by torch.compile(backend='attnopt').",
        hint="attnopt.verify(original, optimized, inputs) compares the two at any time.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return (q @ k.mT * 0.25).softmax(-1) @ v


            q, k, v = torch.randn(3, 2, 9, 16)
            config = attnopt.OptimizeConfig(verify=False)
            report = attnopt.optimize(Attention(), (q, k, v), config=config).attnopt_report
        """),
    ),
    "AO305": Page(
        title="captured again",
        text="The model ran in another way than it was captured for, and was captured again; the report is that of the latest capture.",
        cause="A captured graph holds for one dtype, device, mode (training or not) and form of arguments.",
        hint="Nothing, for a few variants. For many, pass inputs of the form that is used later, or open sizes with dynamic_shapes.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return (q @ k.mT * 0.25).softmax(-1) @ v


            q, k, v = torch.randn(3, 2, 9, 16)
            optimized = attnopt.optimize(Attention(), (q, k, v))
            optimized(q.double(), k.double(), v.double())
            report = optimized.attnopt_report
        """),
    ),
    "AO306": Page(
        title="a compiled function was left as it is",
        text="torch.compile handed over a function that cannot be traced to the form that the analysis reads; it runs as torch.compile made it, and no attention in it is seen.",
        cause="The function holds an operator that is no function of tensors alone, such as a transform of torch.func, whose tensors have a hidden axis.",
        hint="Write a map over a batch as operations on the whole batch.",
        example=script("""
            def attend(q, k, v):
                return (q @ k.mT * 0.25).softmax(-1) @ v


            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return torch.func.vmap(attend)(q, k, v)  # <- here


            q, k, v = torch.randn(3, 2, 9, 16)
            config = attnopt.OptimizeConfig(capture="dynamo")
            report = attnopt.optimize(Attention(), (q, k, v), config=config).attnopt_report
        """),
    ),
    "AO307": Page(
        title="operators of a file have no translation",
        text="Some operators of the ONNX file are not known: the analysis takes their results as given, and knows nothing of them but dtype and shape. "
        "They stay in the file as they are.",
        cause="attnopt translates the standard operators that attentions, masks and what is around them are made of. Others, those of other domains, and those whose "
        "shapes depend on data, are left out.",
        hint="Nothing, if every attention was replaced. Otherwise export the part between queries and the softmax in standard operators.",
        example=script(
            """
            model = onnx.parser.parse_model('''
                <ir_version: 10, opset_import: ["": 20]>
                example (float[b, s, 16] x) => (float[b, s, 16] y) {
                    z = HardSwish(x)
                    t = Transpose<perm = [0, 2, 1]>(z)
                    scores = MatMul(z, t)
                    p = Softmax(scores)
                    y = MatMul(p, z)
                }
            ''')
            report = attnopt.optimize_onnx(model).analysis
            """,
            head="import onnx\n\nimport attnopt\n\n\n",
        ),
    ),
}
