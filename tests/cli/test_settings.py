"""Settings in TOML, and the options above them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from torch import nn

from fxquant import api
from fxquant.cli.settings import MODES, Settings, add_settings, from_toml, read_settings
from fxquant.errors import ConfigError
from fxquant.spec import QConfig, QSpec
from tests.cli.command import Command, M

ALL = """
mode = "static"
qconfig = { activation = { symmetric = true, observer = "minmax" }, output = "float" }
backend = "reference"
patterns = ["tests.cli.models:double_linear"]
max_batches = 2
min_coverage = 0.25
strict = true

[overrides]
"2" = "float"
"re:.*attn" = "qnnpack"
"torch.nn:Linear" = { weight = "float" }
"""


def parsed(*words: str) -> Settings:
    """The settings that options make."""
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return read_settings(parser.parse_args(words))


def test_all_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(ALL)
    assert from_toml(str(path)) == Settings(
        mode="static",
        qconfig=QConfig(activation=QSpec(symmetric=True, observer="minmax"), output=None),
        backend="reference",
        overrides={"2": None, "re:.*attn": "qnnpack", "torch.nn:Linear": QConfig(weight=None)},
        patterns=("tests.cli.models:double_linear",),
        max_batches=2,
        min_coverage=0.25,
        strict=True,
    )


def test_modes_are_those_of_quantize() -> None:
    assert set(MODES) == set(api._MODES)


def test_selectors_are_imported() -> None:
    given = parsed("--override", "torch.nn:Linear=float", "--override", "re:a=b.*=dynamic")
    assert given.keywords()["overrides"] == {nn.Linear: None, "re:a=b.*": "dynamic"}


def test_options_stand_above_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(ALL)
    given = parsed("-c", str(path), "--mode", "dynamic", "--override", "2=dynamic")
    assert given.mode == "dynamic"
    assert given.max_batches == 2
    assert given.strict
    # the last match wins, and the last is what was said last
    assert list(given.overrides) == ["re:.*attn", "torch.nn:Linear", "2"]
    assert given.overrides["2"] == "dynamic"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mod = 'static'", "no setting 'mod'; did you mean 'mode'?"),
        ("mode = 'statik'", "did you mean 'static'?"),
        ("mode = 3", "mode is 3: it must be a string"),
        ("max_batches = true", "it must be a whole number"),
        ("strict = 1", "it must be true or false"),
        ("patterns = [1]", "it must be strings"),
        ("qconfig = 'defautl'", "'default'"),
        ("qconfig = 'float'", "then nothing is quantized"),
        ("qconfig = 3", "the name of a preset or a table"),
        ("[qconfig]\nactivatoin = 'float'", "did you mean 'activation'?"),
        ("[qconfig]\nactivation = 'int8'", "it must be a table or 'float'"),
        ("[qconfig.weight]\nbit = 4", "did you mean 'bits'?"),
        ("[qconfig.weight]\nbits = 99", "qconfig.weight: QSpec.bits is 99"),
        ("[qconfig.activation]\ngranularity = 'channel'", "QConfig.activation asks"),
        ("[overrides]\nhead = 3", "overrides.head is 3"),
        ("[overrides]\nhead = 'none'", "'float' leaves ops in float"),
        ("overrides = 'head'", "it must be a table"),
        ("mode =", "is no TOML"),
        ("\udcff", "is no TOML"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        from_toml(str(path))
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        from_toml(str(tmp_path / "nowhere.toml"))


def test_a_file_end_to_end(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(ALL.replace('"re:.*attn" = "qnnpack"\n', ""))
    words = ("quantize", f"{M}:build", "--calibration", f"{M}:loader", "-c", path, "--json")
    done = fx(*words, "--override", "0=default")
    assert done.code == 0
    assert done.data["settings"]["qconfig"]["output"] is None
    assert {op["path"]: op["runs"] for op in done.data["report"]["ops"]} == {
        "0": "int8",
        "2": "float",
    }
    path.write_text("mod = 1")
    assert fx(*words).code == 2
