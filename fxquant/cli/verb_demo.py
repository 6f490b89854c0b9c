"""``fxquant demo``: everything once, on real handwriting."""

from __future__ import annotations

import argparse
import importlib
from typing import Final

from fxquant.cli.parsing import natural, positive
from fxquant.cli.terminal import say
from fxquant.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=natural, default=0, help="of all that is random (0)")
    parser.add_argument("--epochs", type=positive, help="rounds of training")


def _demo(arguments: argparse.Namespace) -> Answer:
    # Imported when asked for: it needs scikit-learn, and no other verb does.
    demo = importlib.import_module("fxquant.demo")
    epochs = demo.EPOCHS if arguments.epochs is None else arguments.epochs
    shown = demo.run(seed=arguments.seed, epochs=epochs, say=say)
    return Answer(str(shown), shown.to_dict())


DEMO: Final = Verb(
    "demo", "train a small network, quantize it, compare both", _demo, _options, "demo"
)
