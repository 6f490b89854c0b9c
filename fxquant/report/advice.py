"""What would change a decision: one sentence for every reason that passes give."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from fxquant.graph.text import shown
from fxquant.record import OpRecord

_NAME: Final = 120
_MOST: Final = 4
"""How many paths an override names at most."""

_PRESETS: Final = {
    "dynamic": "'dynamic'",
    "weight_only": "'weight-only-int8'",
    "bfloat16": "'bfloat16'",
    "float16": "'float16'",
}
"""What gives an op the form that its model's mode makes, where that is no static one."""
_RECURRENT: Final = ("lstm", "gru", "rnn")

_BY_REASON: Final = (
    ("asked to stay float", "an override after the one that decided, {override}, makes it {form}"),
    ("its weight was asked", "give its QConfig a weight, such as {override}"),
    ("calibration never reached", "calibrate with batches that take the way through it"),
    ("is not a floating-point tensor", "nothing: what it reads are integers or booleans"),
    ("no range is known for", "calibrate with batches that take the way through it"),
    ("nothing reads its result as codes", "make what reads its result int8"),
    ("its input is float", "make what it reads int8"),
    ("its float kernel is faster", "overrides={{{path}: 'dynamic'}} makes it int8, for its size"),
    ("recurrent layers have no weight-only form",
     "overrides={{{path}: 'dynamic'}} stores int8 weights, and computes with them"),
    *((f"conv{n}d has no weight-only form", "overrides={{{path}: 'dynamic'}} stores int8 weights, "
       "and computes with them") for n in (1, 2, 3)),
    ("no dynamic form", "mode='static' has int8 forms of more ops; it needs calibration data"),
    ("no weight-only form", "mode='static' or mode='dynamic' have int8 forms of more ops"),
    ("is faster in float here", "a fxquant.Pattern with kernel= around it is always int8; so is "
     "one that ties it to the layer before it"),
    ("its weight has no shape yet", "run the model once before quantizing it"),
    ("int8 kernels are made from float32", "quantize copy.deepcopy(model).float()"),
    ("holds NaN or infinity", "load weights without NaN and infinity"),
    ("weight is computed", "keep the weight as a parameter, so that it is the same in every call"),
    ("batch norm in training mode", "call model.eval() before"),
    ("without running statistics", "train the batch norm with track_running_stats=True"),
    ("it is active dropout", "call model.eval() before"),
    ("are drawn anew", "call model.eval() before"),
    ("tracks statistics changes", "call model.eval() before"),
    ("whether its input is a tensor", "pass example_inputs, so that it is known"),
    ("is computed by", "make it a parameter or a constant of the model"),
    ("computed in every call", "make it a constant of the model"),
    ("in place", "write a new tensor instead: y = x + 1, not x += 1"),
    ("carries forward hooks", "remove the hooks before quantizing"),
    ("with a mask", "nothing: minus infinity has no code"),
    ("is a mask", "nothing: a range that held it would hold little else"),
    ("lies outside", "nothing: no code stands for the constant that it puts in"),
    ("takes indices", "nothing: indices have no scale"),
    ("computed from parameters alone", "nothing: it costs nothing, it is a constant"),
    ("could pass 32 bits", "use fewer bits for its weight: QSpec('int8', bits=7, symmetric=True, "
     "granularity='channel')"),
    ("max_norm changes its table", "set its max_norm to None: it is for training"),
    ("would not shrink", "nothing: its table is too small, or holds no float32, to be stored so"),
    ("reads the same table", "untie it: a table that is also read in float would be stored twice"),
    ("is read as a tensor too",
     "untie it: a table that is also read in float would be stored twice"),
    ("it stays float32", "nothing: 16 bits are too few for it, or what is around it is float32"),
    ("the model's own code", "move the branch on values out of that module, or give example_inputs "
     "that let it be traced"),
    ("out of a packed sequence", "nothing: a packed sequence holds more than one tensor"),
    ("the op table does not know", "write it with ops that fxquant knows, or take it out of the "
     "quantized model"),
    ("no int8 form of", "write it with ops that fxquant knows, or take it out of the quantized "
     "model"),
    ("no canonical form", "call it in a plainer way: without that argument"),
)  # fmt: skip
"""A part of the reason, and the way out; the first that fits counts."""

_BY_WHOM: Final = (
    ("backend ", "use a backend that has a kernel for it: fxquant.backends() lists them"),
    ("override ", "change that override, or add {override} after it"),
    ("the op table", "write it with ops that fxquant knows"),
    ("annotate", "a fxquant.Pattern that ties it to its neighbours runs them as one int8 op"),
)


def advice(op: OpRecord, mode: str = "static", members: Collection[str] = ()) -> str:
    """What a user can do to have ``op`` decided otherwise.

    Args:
        op: what became of it.
        mode: the mode of its model.
        members: paths of all that became it, where they are known.
    """
    path = repr(shown(op.path, _NAME) or "...")
    if op.int8 or op.by == "cast-floats":
        # An override that names a part of a user's unit would only split it.
        named = members if op.by.startswith("pattern ") else ()
        every = [repr(shown(name, _NAME)) for name in named][:_MOST] or [path]
        return f"overrides={{{', '.join(f'{name}: None' for name in every)}}} leaves it in float"
    preset = _PRESETS.get(mode, "fxquant.QConfig()")
    if op.op.lower() in _RECURRENT:
        preset = "'dynamic'"
    form = mode if preset[1:-1] in ("bfloat16", "float16") else "int8"
    words = {"path": path, "override": f"{path}: {preset}", "form": form}
    if op.op == "matmul" and op.by == "place":
        return "overrides={torch.matmul: fxquant.QConfig()} runs products of matrices in int8"
    if op.op.startswith(("matmul", "scaled_dot_product_attention")) and "overrides=" in op.why:
        return "the override named above"
    for part, way in _BY_REASON:
        if part in op.why:
            return way.format(**words)
    for whom, way in _BY_WHOM:
        if op.by.startswith(whom):
            return way.format(**words)
    return "nothing that fxquant knows of"
