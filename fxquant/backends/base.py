"""What a backend is: what it can run in int8, what that costs, and the rules that lower to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from torch import nn

from fxquant.graph.op_table import op_named, op_names
from fxquant.graph.ops import Kind
from fxquant.graph.user_class import Executor
from fxquant.patterns.rule import Rule


@dataclass(frozen=True)
class Cost:
    """What one execution of an op costs.

    Args:
        call: microseconds of a call, whatever its size.
        element: nanoseconds per element of its largest tensor.
        product: nanoseconds per multiply-accumulate, of ops that do them.
        matrix: microseconds per matrix of a batch of products.
    """

    call: float
    element: float
    product: float = 0.0
    matrix: float = 0.0

    def of(self, elements: int, products: int = 0, matrices: int = 0) -> float:
        """Microseconds for a tensor of that many elements, and as many products."""
        each = self.element * elements + self.product * products
        return self.call + self.matrix * matrices + each / 1000.0


@dataclass(frozen=True)
class Costs:
    """Measured costs of ops in float and on codes, two threads, batch 1 sizes.

    Args:
        quantize: float to codes.
        dequantize: codes to float.
        on_codes: op name to its cost on codes; ``""`` is the default.
        in_float: op name to its cost in float; ``""`` is the default.
    """

    quantize: Cost
    dequantize: Cost
    on_codes: dict[str, Cost]
    in_float: dict[str, Cost]

    def codes(self, op: str) -> Cost:
        """The cost of ``op`` on codes."""
        return self.on_codes.get(op, self.on_codes[""])

    def real(self, op: str) -> Cost:
        """The cost of ``op`` in float."""
        return self.in_float.get(op, self.in_float[""])

    def recurrent(self) -> tuple[Cost, Cost]:
        """The costs of a step of a recurrent layer in float and on codes."""
        return self.real("recurrent"), self.codes("recurrent")


_POOLS: Final = tuple(f"max_pool{rank}d" for rank in (1, 2, 3))

_BLENDS: Final = ("where", "masked_fill")


def _of_kind(kind: Kind) -> tuple[str, ...]:
    return tuple(name for name in op_names() if op_named(name).kind is kind)


_MOVES: Final = tuple(
    name
    for kind in (Kind.MOVE, Kind.SPLIT)
    for name in _of_kind(kind)
    if name not in (*_POOLS, *_BLENDS, "amax", "amin")
)
_VIEWS: Final = tuple(name for name in _MOVES if op_named(name).alias)
"""What is another look at the same memory. Sometimes one of them has to copy: not as a rule."""
_COPIES: Final = tuple(name for name in _MOVES if name not in _VIEWS)

GELU_TANH: Final = "gelu with tanh"
"""The name of costs of ``gelu(x, approximate="tanh")``, which takes thrice as long."""
GATE: Final = "mul by a gate"
"""The name of costs of a product of pictures with one number for each of their channels."""

_ACTIVATIONS: Final = {
    # Timed like the table: 20,000 to 1,600,000 numbers.
    "relu": Cost(3.0, 0.12),
    "gelu": Cost(8.0, 0.4),
    GELU_TANH: Cost(10.0, 1.1),
    **dict.fromkeys(("silu", "sigmoid", "tanh"), Cost(6.0, 0.27)),
    **dict.fromkeys(("relu6", "hardtanh", "leaky_relu", "hardswish"), Cost(4.0, 0.16)),
    "hardsigmoid": Cost(4.0, 0.16),
    **dict.fromkeys(("elu", "celu", "selu", "softplus"), Cost(10.0, 0.8)),
    "mish": Cost(15.0, 2.1),
}

_FLOAT_INSIDE_ON_CODES: Final = {
    # Timed by benchmarks/ops_on_codes.py: 150,000 to 800,000 codes.
    "layer_norm": Cost(25.0, 0.45),
    "group_norm": Cost(30.0, 0.65),
    "instance_norm": Cost(40.0, 4.4),
    "rms_norm": Cost(30.0, 0.85),
    "normalize": Cost(30.0, 0.75),
    "local_response_norm": Cost(60.0, 78.0),
    "softmax": Cost(20.0, 0.6),
    "log_softmax": Cost(20.0, 0.6),
    "interpolate": Cost(20.0, 0.66),
    "prelu": Cost(15.0, 0.4),
    "norm": Cost(20.0, 0.5),
    "vector_norm": Cost(20.0, 0.5),
}
_FLOAT_INSIDE_IN_FLOAT: Final = {
    "layer_norm": Cost(10.0, 0.18),
    "group_norm": Cost(12.0, 0.34),
    "instance_norm": Cost(30.0, 4.0),
    "rms_norm": Cost(15.0, 0.42),
    "normalize": Cost(15.0, 0.2),
    "local_response_norm": Cost(50.0, 80.0),
    "softmax": Cost(8.0, 0.23),
    "log_softmax": Cost(8.0, 0.23),
    "interpolate": Cost(10.0, 0.26),
    "norm": Cost(10.0, 0.1),
    "vector_norm": Cost(10.0, 0.1),
    "unary": Cost(15.0, 0.4),
}

RECURRENT: Final = (Cost(25.0, 0.0, 0.0065), Cost(4.0, 0.0, 0.052))
"""A step of a recurrent layer at batch 1, in int8 and in float, for a thousand weights of a cell.

A line through the least times of ``python -m benchmarks.recurrent --layers 1 --width N --hidden N``
over its 64 steps, for an LSTM with N of 128, 256, 512, 768 and 1024 on two AVX512-VNNI cores: 25,
29, 32, 82 and 77 us in int8 and 10, 38, 117, 290 and 435 in float. They meet near N = 240.
"""

MEASURED: Final = Costs(
    # Timed in eager torch 2.13 on a two-core AVX512-VNNI machine, tensors of 150,000 to 800,000.
    # In one pass, see x86_quantize.py: 13, 23, 92 and 360 us for 20,000 to 1,600,000 numbers.
    quantize=Cost(10.0, 0.21),
    dequantize=Cost(7.0, 0.22),
    on_codes={
        # A 256-entry table: 21, 95, 351 and 1213 us for 20,000 to 1,600,000 codes.
        "": Cost(8.0, 0.85),
        "add": Cost(30.0, 0.6),
        "sub": Cost(30.0, 0.6),
        "mul": Cost(30.0, 0.6),
        # 32, 34 and 51 us for 56,000, 188,000 and 301,000 codes.
        GATE: Cost(25.0, 0.08),
        "batch_norm": Cost(14.0, 0.17),
        # One integer product a matrix; then zero points are taken out of every sum.
        "matmul": Cost(36.0, 1.2, 0.0019, 9.0),
        **{name: Cost(8.0, 0.08) for name in _of_kind(Kind.JOIN)},
        **{name: Cost(12.0, 0.2) for name in _BLENDS},
        **{name: Cost(10.0, 10.0) for name in _of_kind(Kind.PICK)},
        **{name: Cost(8.0, 2.0) for name in _of_kind(Kind.INDEX)},
        # Timed by benchmarks/moves_on_codes.py, one thread, 200,000 elements: slower on codes.
        "index_put": Cost(12.0, 0.7),
        "recurrent": RECURRENT[0],
        **{f"max_pool{rank}d_with_indices": Cost(20.0, 29.0) for rank in (1, 2, 3)},
        **{name: Cost(15.0, 0.16) for name in _POOLS},
        "max_pool1d": Cost(15.0, 0.86),
        # 6, 8, 9 and 13 us for 6,000, 100,000, 200,000 and 401,000 codes.
        "max_pool2d": Cost(8.0, 0.04),
        **{f"avg_pool{r}d": Cost(15.0, 0.5) for r in (1, 2, 3)},
        # As a convolution from some size on: 28, 39, 46 and 54 us for the same.
        "avg_pool2d": Cost(28.0, 0.08),
        # 23, 35, 48 and 78 us for 4,000, 63,000, 132,000 and 188,000 codes; 49 for 64 pictures.
        **{f"adaptive_avg_pool{r}d": Cost(18.0, 0.2) for r in (1, 2, 3)},
        **{name: Cost(18.0, 0.2) for name in ("mean", "sum")},
        **{name: Cost(12.0, 0.1) for name in ("amax", "amin")},
        **{name: Cost(25.0, 0.8) for name in ("div", "maximum", "minimum", "lerp", "glu")},
        **{name: Cost(30.0, 1.0) for name in ("addcmul", "addcdiv")},
        **_FLOAT_INSIDE_ON_CODES,
        **dict.fromkeys(_COPIES, Cost(3.0, 0.04)),
        **dict.fromkeys(_VIEWS, Cost(2.0, 0.0)),
    },
    in_float={
        "": Cost(5.0, 0.2),
        "add": Cost(4.0, 0.12),
        "sub": Cost(4.0, 0.12),
        "mul": Cost(4.0, 0.12),
        GATE: Cost(4.0, 0.1),
        "batch_norm": Cost(9.0, 0.17),
        "matmul": Cost(4.0, 0.0, 0.0068),
        **{name: Cost(5.0, 0.25) for name in _of_kind(Kind.JOIN)},
        **{name: Cost(5.0, 0.75) for name in _BLENDS},
        **{name: Cost(10.0, 11.0) for name in _of_kind(Kind.PICK)},
        **{name: Cost(8.0, 4.0) for name in _of_kind(Kind.INDEX)},
        "index_put": Cost(10.0, 0.6),
        "recurrent": RECURRENT[1],
        **{f"max_pool{rank}d_with_indices": Cost(10.0, 24.5) for rank in (1, 2, 3)},
        **{name: Cost(8.0, 0.25) for name in _POOLS},
        "max_pool1d": Cost(8.0, 0.5),
        **{f"avg_pool{r}d": Cost(8.0, 0.25) for r in (1, 2, 3)},
        **{f"adaptive_avg_pool{r}d": Cost(8.0, 0.15) for r in (1, 2, 3)},
        **{name: Cost(8.0, 0.1) for name in ("mean", "sum", "amax", "amin")},
        **{name: Cost(5.0, 0.12) for name in ("div", "maximum", "minimum", "lerp", "prelu")},
        **{name: Cost(6.0, 0.15) for name in ("glu", "addcmul", "addcdiv")},
        **_FLOAT_INSIDE_IN_FLOAT,
        **dict.fromkeys(_COPIES, Cost(3.0, 0.12)),
        **dict.fromkeys(_VIEWS, Cost(2.0, 0.0)),
        **_ACTIVATIONS,
    },
)

WITHOUT_VNNI: Final = dataclasses.replace(
    MEASURED,
    # torch._int_mm without VNNI is a plain loop: timed on two AVX2 cores at 512 x 512 x 512, 114 ms
    # against 1.8 ms in float32.
    # Recurrent layers were not timed again; these two meet near 550 units.
    on_codes={
        **MEASURED.on_codes,
        "matmul": Cost(36.0, 1.2, 0.85, 9.0),
        "recurrent": Cost(55.0, 0.0, 0.022),
    },
    in_float={**MEASURED.in_float, "recurrent": Cost(4.0, 0.0, 0.043)},
)
"""The same where the processor adds products in pairs."""

REASONS: Final = {
    "scaled_dot_product_attention": (
        "torch's fused attention in float took 0.3 to 0.6 of the time of two integer products with "
        "a softmax between them (12 heads of 64; 128, 197 and 512 tokens, two threads); "
        "overrides={F.scaled_dot_product_attention: QConfig()} opens it into int8 products"
    ),
    **dict.fromkeys(
        ("embedding", "embedding_bag"),
        "its indices are no numbers to quantize; its table becomes int8 when converted",
    ),
    "var": "a variance spans the square of its input's range, too wide for eight bits to divide by",
    "std": "a deviation is divided by, and the codes nearest to 0 are too coarse for that",
    "logsumexp": "sums of exponentials need float, and there is one result for a whole row",
    **{
        f"lp_pool{rank}d": "powers and roots of sums need float; nothing is saved by codes"
        for rank in (1, 2, 3)
    },
}
"""Why an op without an int8 form has none."""

_ARITHMETIC: Final = (
    *("add", "sub", "mul", "div", "cat", "stack", "batch_norm", "mean", "sum", "interpolate"),
    "matmul",
    *("maximum", "minimum", "addcmul", "addcdiv", "lerp", "prelu", "glu"),
    *("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"),
    *("local_response_norm", "softmax", "log_softmax", "norm", "vector_norm"),
    *(f"{kind}_pool{rank}d" for kind in ("avg", "adaptive_avg") for rank in (1, 2, 3)),
)

_BY_KIND: Final = (
    *(Kind.CONTRACT, Kind.UNARY, Kind.MOVE, Kind.JOIN, Kind.SPLIT, Kind.PICK, Kind.INDEX),
)

INT8_OPS: Final = frozenset(
    (
        *_ARITHMETIC,
        *(name for name in op_names() if op_named(name).kind in _BY_KIND),
    )
)
"""Ops with an int8 form in the Q/DQ graph, whatever runs it."""


class Backend(Protocol):
    """Runs a Q/DQ graph.

    ``name`` is what users pass as ``backend=``; ``rules`` rewrite parts of the Q/DQ graph to the
    backend's own ops, ``modules`` give its own form of whole modules, and whatever neither takes
    runs as it stands.
    """

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Lowering rules."""

    @property
    def modules(self) -> Mapping[type[nn.Module], Callable[..., nn.Module]]:
        """Its own form of modules that compute in int8 already, by their class."""

    @property
    def costs(self) -> Costs:
        """What its ops cost."""

    @property
    def saturates_pairs(self) -> bool:
        """Whether its kernels add u8*s8 products in pairs of 16 bits (x86 without VNNI)."""

    @property
    def reads_unsigned(self) -> bool:
        """Whether its kernels read uint8; then int8 activations are stored so, 128 higher."""

    @property
    def cpu_only(self) -> bool:
        """Whether its models run on the CPU and nowhere else."""

    @property
    def executor(self) -> Callable[[], Executor] | None:
        """What makes the executor of a lowered model; ``None`` where its graph's code is run."""

    def missing(self) -> str | None:
        """Why it cannot run here, or ``None``."""


@dataclass(frozen=True)
class Availability:
    """One line of :func:`fxquant.backends`.

    Args:
        name: the backend.
        available: whether it can run here.
        reason: why not, or what it is.
        detail: facts about this machine that matter to it.
    """

    name: str
    available: bool
    reason: str
    detail: dict[str, str] = field(default_factory=dict)
