"""The Python interface: optimize a module, read what was done, save it, run it.

    python examples/python_api.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nanogpt
import torch

import attnopt
from attnopt.emit.pt2 import save_pt2


def main() -> None:
    model, tokens = nanogpt.model(), nanogpt.example_inputs()
    optimized = attnopt.optimize(model, (tokens,))

    report = optimized.attnopt_report
    print(report)
    for site in report.sites:
        print(f"{site.name}: causal {site.spec.causal}, scale {site.spec.scale:.4f}, kernel {site.kernel}")

    # The same module from outside: the parameters are shared, the names are the same, other sizes work too.
    assert optimized.state_dict().keys() == model.state_dict().keys()
    longer = torch.randint(0, nanogpt.VOCABULARY, (3, 400))
    with torch.no_grad():
        print("largest difference at another batch and length:", (optimized(longer) - model(longer)).abs().max().item())

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nanogpt.pt2"
        save_pt2(optimized, file)
        again = torch.export.load(file).module()  # a fresh process needs `import attnopt` first
        print("saved and loaded:", torch.equal(again(tokens), optimized(tokens)))


if __name__ == "__main__":
    main()
