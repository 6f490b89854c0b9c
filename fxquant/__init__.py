"""fxquant turns a float PyTorch model into one that runs int8 kernels, and shows every rewrite.

>>> import torch, fxquant
>>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
>>> q = fxquant.quantize(net, [torch.randn(8, 3, 16, 16)], mode="static", backend="reference")
>>> bool(fxquant.diff(q))
True
"""

from fxquant.collector import collector_paused

# A collection now would look through all that torch has made, a third of the time of this import.
with collector_paused():
    from fxquant.api import backends, calibrate, convert, prepare, quantize
    from fxquant.custom.pattern import Pattern, pattern
    from fxquant.report.api import compare, diff, explain, history, report, verify
    from fxquant.schedule import Schedule
    from fxquant.spec import QConfig, QSpec

__all__ = [
    "Pattern",
    "QConfig",
    "QSpec",
    "Schedule",
    "backends",
    "calibrate",
    "compare",
    "convert",
    "diff",
    "explain",
    "history",
    "pattern",
    "prepare",
    "quantize",
    "report",
    "verify",
]
__version__ = "0.1.0"
