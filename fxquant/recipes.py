"""Recipes: which passes a mode runs, and which backend stands behind a name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Final

from torch import nn

from fxquant.backends.base import INT8_OPS, REASONS, Availability, Backend
from fxquant.backends.cuda import Cuda
from fxquant.backends.reference import Reference
from fxquant.backends.x86 import X86
from fxquant.backends.x86_pairs import has_vnni
from fxquant.errors import ConfigError
from fxquant.passes.adopt_norms import AdoptNorms
from fxquant.passes.adopt_products import AdoptProducts
from fxquant.passes.annotate import Annotate
from fxquant.passes.annotate_recurrent import AnnotateRecurrent
from fxquant.passes.base import Pass
from fxquant.passes.call_kernels import CallKernels
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.cast_floats import CastFloats
from fxquant.passes.configure import Configure, Selector
from fxquant.passes.convert import Convert
from fxquant.passes.convert_dynamic import ConvertDynamic
from fxquant.passes.convert_recurrent import ConvertRecurrent
from fxquant.passes.convert_weights import ConvertWeights
from fxquant.passes.decompose import Decompose
from fxquant.passes.fake_quantize import HOME, InsertFakeQuants
from fxquant.passes.fold_constants import FoldConstants
from fxquant.passes.fold_trained import FoldTrained
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse import Fuse
from fxquant.passes.lower import Lower
from fxquant.passes.observe import Observe
from fxquant.passes.open_attention import OpenAttention
from fxquant.passes.place import Place
from fxquant.passes.propose import Propose
from fxquant.passes.read_ranges import ReadRanges
from fxquant.passes.restore_units import RestoreUnits
from fxquant.passes.share_scales import ShareScales
from fxquant.passes.split_output_size import SplitOutputSize
from fxquant.passes.split_padding import SplitPadding
from fxquant.passes.train_units import TrainUnits
from fxquant.passes.unshare import Unshare
from fxquant.passes.unsigned_codes import UnsignedCodes
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.patterns.norm import CONVS, TRANSPOSED
from fxquant.patterns.rule import Rule
from fxquant.patterns.trained import TRAINING_RULES
from fxquant.pipeline import Pipeline
from fxquant.spec import QConfig, Scheme

_BACKENDS: Final[dict[str, Callable[[], Backend]]] = {
    "x86": X86,
    "cuda": Cuda,
    "reference": Reference,
}
_ANYWHERE: Final = "reference"
_ON: Final = {"cpu": ("x86", _ANYWHERE), "cuda": ("cuda", _ANYWHERE)}
"""Fastest first: the order in which ``"auto"`` tries them, by where the model is."""
_ONLY: Final = {"cuda": ("dynamic", "weight_only")}
"""Modes that a backend has kernels for; the others have some for all."""

_ABOUT: Final = {
    "x86": "torch's built-in oneDNN int8 operators",
    "cuda": "torch's integer product for dynamic linears, for models on a GPU",
    "reference": "quantize and dequantize in float, every device, the numerical truth",
}


OTHER_OPS: Final[dict[Scheme, frozenset[str]]] = {
    "dynamic": frozenset({"linear", "matmul", *CONVS, *TRANSPOSED}),
    "weight_only": frozenset({"linear", "embedding", "embedding_bag"}),
}
"""Ops with an int8 form by another scheme than the static one."""


def prepare_recipe(
    qconfig: QConfig,
    overrides: tuple[tuple[Selector, QConfig | None], ...],
    patterns: tuple[Rule, ...],
    ranks: Mapping[str, int],
    *,
    must_match: bool = True,
) -> Pipeline:
    """From the captured graph to one with observers.

    Args:
        qconfig: the default configuration.
        overrides: selectors and what applies to them, in order.
        patterns: fusion rules beside the built-in ones.
        ranks: how many dimensions each input has, as far as that is known.
        must_match: whether an override that matches nothing is an error.
    """
    known = tuple(sorted(ranks.items()))
    return Pipeline(
        (
            Functionalize(),
            Unshare(),
            FoldConstants(),
            SplitOutputSize(),
            Canonicalize(),
            SplitPadding(),
            Decompose(known),
            AdoptProducts(known),
            AdoptNorms(),
            Configure(qconfig, overrides, must_match),
            OpenAttention(),
            Fuse((*patterns, *FUSION_RULES), known),
            Annotate(INT8_OPS, REASONS, OTHER_OPS),
            AnnotateRecurrent(),
            Observe(),
        )
    )


def training_recipe(
    qconfig: QConfig,
    overrides: tuple[tuple[Selector, QConfig | None], ...],
    patterns: tuple[Rule, ...],
    ranks: Mapping[str, int],
    drop: frozenset[str] = frozenset(),
) -> Pipeline:
    """From the graph captured for training to one whose ops are decided on.

    Modules stay the user's own and are shared as they were; nothing that depends on a parameter
    is computed beforehand.

    Args:
        qconfig: the default configuration.
        overrides: selectors and what applies to them, in order.
        patterns: fusion rules beside the built-in ones.
        ranks: how many dimensions each input has, as far as that is known.
        drop: names of the nodes that drop something in training only.
    """
    known = tuple(sorted(ranks.items()))
    return Pipeline(
        (
            Functionalize(),
            SplitOutputSize(),
            Canonicalize(),
            SplitPadding(),
            Decompose(known),
            AdoptProducts(known),
            AdoptNorms(),
            Configure(qconfig, overrides),
            OpenAttention(drop),
            Fuse((*patterns, *TRAINING_RULES), known),
            Annotate(INT8_OPS, REASONS, OTHER_OPS, trained=True),
            AnnotateRecurrent(),
        )
    )


def fake_quantize_recipe(
    backend: Backend, droppers: Mapping[str, tuple[str, nn.Module]]
) -> Pipeline:
    """From decisions to a graph with fake-quants: ops that lose time on codes are trained in float.

    Args:
        backend: what the model will be converted for.
        droppers: what drops at random in training, by the name of the node that calls it.
    """
    insert = InsertFakeQuants(backend.saturates_pairs, droppers, backend.costs)
    return Pipeline((Propose(), Place(backend.costs), insert, TrainUnits(HOME)))


def convert_recipe(backend: Backend, *, trained: bool = False) -> Pipeline:
    """From a calibrated graph, or a trained one, to the backend's own ops."""
    unsigned = UnsignedCodes(backend.reads_unsigned)
    start: tuple[Pass, ...] = (ReadRanges(), unsigned, ShareScales(), Place(backend.costs))
    if trained:
        # What was trained on codes is deployed on them, with the scales it was trained with.
        read = (RestoreUnits(), FoldTrained(), ReadRanges())
        start = (*read, unsigned, ShareScales(joins=False))
    return Pipeline(
        (
            *start,
            ConvertRecurrent(backend.costs, backend.saturates_pairs),
            ConvertWeights(),
            Convert(backend.saturates_pairs),
            CastFloats(),
            ConvertDynamic(),
            CallKernels(),
            Lower(backend.rules, backend.modules),
        )
    )


def available_backends() -> tuple[Availability, ...]:
    """Every backend, whether it can run here, and why not."""
    found = []
    for name, make in _BACKENDS.items():
        why = make().missing()
        detail = {"vnni": str(has_vnni()).lower()} if name == "x86" and why is None else {}
        found.append(Availability(name, why is None, why or _ABOUT[name], detail))
    return tuple(found)


def resolve_backend(name: str, model: nn.Module | None = None, mode: str = "static") -> Backend:
    """The backend a user named, or the fastest that works here for ``"auto"``.

    Args:
        name: what the user passed.
        model: what is to be converted: where it is decides what ``"auto"`` is.
        mode: the mode it was prepared in, which decides that too.

    Raises:
        ConfigError: no backend has that name, or it cannot run here, or not where the model is.
    """
    if not isinstance(name, str):
        raise ConfigError(f"backend is {name!r}: pass the name of a backend as a string")
    usable = [made for made in (make() for make in _BACKENDS.values()) if made.missing() is None]
    device = _device(model)
    if name == "auto":
        order = [
            known
            for known in _ON.get(device, (_ANYWHERE,))
            if known not in _ONLY or mode in _ONLY[known]
        ]
        return next(backend for known in order for backend in usable if backend.name == known)
    if name not in _BACKENDS:
        near = difflib.get_close_matches(name, _BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"no backend is called {name!r}{hint} Available here: {[b.name for b in usable]}"
        )
    backend = _BACKENDS[name]()
    why = backend.missing()
    if why is not None:
        raise ConfigError(
            f"backend {name!r} cannot run here: {why}. Available: {[b.name for b in usable]}"
        )
    if name == "x86" and device != "cpu":
        raise ConfigError(
            f"the kernels of backend 'x86' read memory of the processor, and the model is on "
            f"{device}: pass backend='auto', or model.cpu()"
        )
    return backend


def _device(model: nn.Module | None) -> str:
    """The kind of device that the model is on, whatever constants of it stay on the processor."""
    held = () if model is None else (*model.parameters(), *model.buffers())
    return next((kind for kind in (t.device.type for t in held) if kind != "cpu"), "cpu")
