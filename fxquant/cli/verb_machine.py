"""``fxquant doctor`` and ``fxquant backends``: what this machine can do, and why not more."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any, Final

import torch

import fxquant
from fxquant.cli.doctor import facts
from fxquant.cli.verb import Answer, Verb
from fxquant.report.tables import table

_ANSWERS: Final = {True: "yes", False: "no", None: "not known"}


def _backends_table(found: list[dict[str, Any]]) -> str:
    rows = [(b["name"], _ANSWERS[b["available"]], b["reason"]) for b in found]
    return table(("backend", "runs here", "about"), rows, limit=200)


def _backends(arguments: argparse.Namespace) -> Answer:
    found = [asdict(backend) for backend in fxquant.backends()]
    data = {
        "fxquant": fxquant.__version__,
        "torch": str(torch.__version__),
        "backends": found,
    }
    return Answer(_backends_table(found), data)


def _doctor(arguments: argparse.Namespace) -> Answer:
    data = facts()
    here = data["machine"]
    rows = [
        ("fxquant", data["fxquant"]),
        ("Python", data["python"]),
        *((name, version or "not installed") for name, version in data["versions"].items()),
        ("system", here["system"]),
        ("processor", here["processor"]),
        ("torch uses", here["capability"]),
        *((name, _ANSWERS[has]) for name, has in here["instructions"].items()),
        ("oneDNN", _ANSWERS[data["onednn"]]),
        ("CUDA", _ANSWERS[here["cuda"]]),
        ("threads", f"{here['threads']}, {here['interop_threads']} between ops"),
        *(
            (f"extra {name}", f"lacks {', '.join(gone)}" if gone else "complete")
            for name, gone in data["extras"].items()
        ),
    ]
    text = table(("what", "here"), rows, limit=200)
    return Answer("\n".join([text, "", _backends_table(data["backends"]), *_advice(data)]), data)


def _advice(data: dict[str, Any]) -> list[str]:
    """What follows from the processor for whoever quantizes on it."""
    has = data["machine"]["instructions"]
    found = []
    if data["adds_pairs"]:
        found.append(
            "the kernels add products in pairs of 16 bits (no VNNI): channels of weights that "
            "could pass those get a coarser scale, and int8 gains less time here"
        )
    if not (has["avx512_bf16"] or has["amx_tile"]):
        found.append("no bfloat16 instructions: mode bfloat16 saves memory here, and no time")
    return ["", *found] if found else []


DOCTOR: Final = Verb(
    "doctor",
    "what this machine can do: text to paste in an issue",
    _doctor,
    examples=("fxquant doctor", "fxquant doctor --json"),
)
BACKENDS: Final = Verb("backends", "what can run here, and why the others cannot", _backends)
