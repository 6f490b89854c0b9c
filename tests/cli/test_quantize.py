"""``fxquant quantize``: models, data, settings, files, and each way it can go wrong."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant
from fxquant.cli import verb_quantize
from fxquant.cli.output import write_text
from tests.cli import models
from tests.cli.command import Command, M

BASE = ("quantize", f"{M}:build", "--backend", "reference")
DATA = ("--calibration", f"{M}:loader")
QAT = ("--calibration", f"{M}:loader", "--mode", "qat", "--train")


def test_stdout_holds_the_result_and_nothing_else(fx: Command) -> None:
    done = fx(*BASE, *DATA)
    assert done.code == 0
    assert done.out.startswith("int8: 2 of 2 ops (100.0%)")
    assert "noise" not in done.out
    assert done.err == "noise of the user's code\n"


def test_json_has_the_documented_shape(fx: Command) -> None:
    done = fx(*BASE, *DATA, "--override", "2=float", "--json")
    assert done.code == 0
    assert list(done.data) == ["model", "dry_run", "settings", "output", "report"]
    assert done.data["settings"] == {
        "mode": "static",
        "qconfig": None,
        "backend": "reference",
        "overrides": {"2": None},
        "patterns": [],
        "max_batches": None,
        "min_coverage": None,
        "strict": False,
        "train": None,
    }
    runs = {op["path"]: op["runs"] for op in done.data["report"]["ops"]}
    assert runs == {"0": "int8", "2": "float"}


def test_the_seed_makes_weights_and_data_repeat(fx: Command) -> None:
    first, second, other = (fx(*BASE, *DATA, "--json", "--seed", n).data for n in (1, 1, 2))
    assert first == second
    assert first != other


def test_the_random_state_outside_is_left_as_found(fx: Command) -> None:
    state = torch.random.get_rng_state()
    fx(*BASE, *DATA, "--seed", "7")
    assert torch.equal(state, torch.random.get_rng_state())


def test_import_path_is_left_as_found(fx: Command) -> None:
    before = list(sys.path)
    fx(*BASE, *DATA)
    assert sys.path == before


@pytest.mark.parametrize("loader", ["loader", "stream", "feed", "LOADED"])
def test_loaders(loader: str, fx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOADED", models.loader(), raising=False)
    assert fx(*BASE, "--calibration", f"{M}:{loader}").code == 0


def test_labels_are_refused_and_a_transform_helps(fx: Command) -> None:
    data = (*BASE, "--calibration", f"{M}:pairs")
    done = fx(*data)
    assert (done.code, done.out) == (4, "")
    assert "batch has 2 items, model takes 1" in done.err
    assert fx(*data, "--transform", f"{M}:first").code == 0


def test_training_of_the_user(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"
    done = fx(*BASE, *QAT, f"{M}:train", "-o", path)
    assert done.code == 0
    assert "mode qat" in done.out and done.out.startswith("int8: 2 of 2 ops")
    assert fx("report", path, "--trust-pickle").code == 0
    settings = tmp_path / "settings.toml"
    settings.write_text(f'mode = "qat"\ntrain = "{M}:train"\n')
    # Without calibration, training finds the ranges; it needs to know what the inputs are like.
    example = ("--example-inputs", f"{M}:loader")
    assert fx(*BASE, *example, "-c", settings, "--json").data["settings"]["train"] == f"{M}:train"
    assert fx(*BASE, *QAT, f"{M}:train", "--dry-run").code == 0


@pytest.mark.parametrize("spec", [f"{M}:Holder.made", f"{M}:Pair"])
def test_a_module_a_class_and_a_path_with_dots(spec: str, fx: Command) -> None:
    done = fx("quantize", spec, "--mode", "dynamic", "--backend", "reference")
    assert done.code == 0


def test_modules_of_the_current_directory(
    fx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(8, 8))\n"
    (tmp_path / "only_here.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "only_here", raising=False)
    assert fx("quantize", "only_here:build", "--mode", "dynamic").code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((f"{M}:biuld",), 3, "did you mean 'build'?"),
        ((f"{M}:fails",), 3, "KeyError: 'oops'"),
        ((f"{M}:leaves",), 3, "it called exit(3)"),
        ((f"{M}:LENGTH",), 3, "is a int"),
        (("tests.cli.nowhere:build",), 3, "there is no module 'tests.cli.nowhere'"),
        (("nowhere",), 3, "neither a file nor package.module:factory"),
        (("nowhere.pt",), 3, "there is no model file"),
        ((":build",), 3, "not of the form"),
        ((f"{M}:Branch", *DATA, "--strict"), 3, "depends on"),
        ((f"{M}:Branch", *DATA), 5, "nothing in this model became int8"),
        ((f"{M}:build", "--calibration", f"{M}:empty"), 4, "0 batches"),
        ((f"{M}:build", "--calibration", f"{M}:broken"), 4, "32 NaN"),
        ((f"{M}:build", "--calibration", "nowhere"), 4, "neither a file"),
        ((f"{M}:build", "--calibration", f"{M}:fails"), 4, "KeyError: 'oops'"),
        ((f"{M}:build", *DATA, "--transform", f"{M}:LENGTH"), 4, "is a int"),
        ((f"{M}:build", *DATA, "--batch-size", "2"), 4, "--batch-size is for files"),
        ((f"{M}:build",), 4, ""),
        ((f"{M}:build", *DATA, "--backend", "x87"), 2, "did you mean 'x86'?"),
        ((f"{M}:build", *DATA, "--qconfig", "defualt"), 2, "Did you mean 'default'?"),
        ((f"{M}:build", *DATA, "--override", "nowhere=float"), 2, "matches nothing"),
        ((f"{M}:build", *DATA, "--override", "nonsense"), 2, "SELECTOR=PRESET"),
        ((f"{M}:build", *DATA, "--override", "0=flaot"), 2, "'float' leaves ops in float"),
        ((f"{M}:build", *DATA, "--override", "torch.nn:Lineer=float"), 2, "did you mean 'Linear'?"),
        ((f"{M}:build", "--transform", f"{M}:first"), 2, "--calibration"),
        ((f"{M}:build", *DATA, "--report", "x.pdf"), 2, "cannot write a report"),
        ((f"{M}:build", *DATA, "--train", f"{M}:train"), 2, "--train is for --mode qat"),
        ((f"{M}:build", *DATA, "--mode", "qat"), 2, "pass --train package.module:function"),
        ((f"{M}:build", *QAT, f"{M}:LENGTH"), 2, "is a int: name a function"),
        ((f"{M}:build", *QAT, f"{M}:trian"), 2, "did you mean 'train'?"),
        ((f"{M}:build", *QAT, f"{M}:feeds_badly"), 4, "could not train the model by"),
        (
            (f"{M}:build", "--mode", "dynamic", "--qconfig", "x86"),
            4,
            "this qconfig asks for ranges",
        ),
        ((f"{M}:build", *DATA, "--override", "0=float", "--override", "2=float"), 5, "nothing"),
        ((f"{M}:build", *DATA, "--override", "0=float", "--min-coverage", "1"), 5, "33%"),
    ],
)
def test_failures_have_their_codes(
    words: tuple[str, ...], code: int, said: str, fx: Command
) -> None:
    done = fx("quantize", *words)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert "error: " in done.err


BROKEN = {
    "def build(:": "SyntaxError",
    "import nothing_of_that_name": "No module named 'nothing_of_that_name'",
    "1 / 0": "ZeroDivisionError",
    "def build():\n    return build()": "RecursionError",
    "def build():\n    return None": "is a NoneType",
    "def build(size): ...": "missing 1 required positional argument",
    "def build():\n    raise ValueError('\\x1b[31m\\u202e' + 9000 * 'n')": r"\x1b[31m\u202e",
    "def __getattr__(name):\n    raise OSError('no ' + name)": "OSError: no build",
    "class Odd(BaseException): ...\ndef build():\n    raise Odd('so')": "Odd: so",
    "\0": "null bytes",
}
"""What may stand in a module of the user's, and what is said of it."""


@pytest.mark.parametrize("text", BROKEN)
def test_broken_modules_of_the_user(
    text: str, fx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_one.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for words in (("quantize", "broken_one:build"), ("report", "broken_one:build")):
        monkeypatch.delitem(sys.modules, "broken_one", raising=False)
        importlib.invalidate_caches()
        done = fx(*words)
        assert (done.code, done.out) == (3, "")
        assert BROKEN[text] in done.err and "\x1b" not in done.err and "\u202e" not in done.err
        assert len(done.err) < 6000


def test_a_file_is_written_and_read_back(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    done = fx(*BASE, *DATA, "-o", path)
    assert done.code == 0
    assert "--trust-pickle" in done.out
    assert os.listdir(tmp_path) == ["model.pt"]
    made = torch.load(path, weights_only=False)
    assert fxquant.report(made).coverage == 1.0
    assert fx("report", path, "--trust-pickle").code == 0


def test_pickles_are_refused_unless_trusted(fx: Command, saved: Path, tmp_path: Path) -> None:
    done = fx("report", saved)
    assert done.code == 3
    assert "--trust-pickle" in done.err and "fxquant.graph" in done.err
    evil = tmp_path / "evil.pt"
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (open, (str(ran), "w"))

    torch.save(Evil(), evil)
    done = fx("report", evil)
    assert done.code == 3
    assert "it imports io.open" in done.err
    assert not ran.exists()
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Evil()))
    assert fx("report", plain).code == 3
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x80\x02."])
def test_files_that_are_no_models(content: bytes, fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    done = fx("report", path, "--trust-pickle")
    assert (done.code, done.out) == (3, "")
    assert "cannot be read" in done.err


def test_a_state_dict_goes_into_a_factory(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(models.build().state_dict(), path)
    done = fx("report", path, "--trust-pickle")
    assert done.code == 3
    assert "--weights" in done.err
    assert fx(*BASE, *DATA, "--weights", path).code == 0
    torch.save(models.Pair().state_dict(), path)
    done = fx(*BASE, *DATA, "--weights", path)
    assert done.code == 3
    assert "do not fit" in done.err
    assert fx(*BASE, *DATA, "--weights", "nowhere.pt").code == 3


def test_example_inputs_that_do_not_fit(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 7), np.float32))
    done = fx(*BASE, "--mode", "dynamic", "--example-inputs", path)
    assert done.code == 4
    assert "could not run the model on" in done.err


def test_files_that_are_no_weights(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(2))
    done = fx(*BASE, *DATA, "--weights", path)
    assert done.code == 3
    assert "without running code" in done.err
    assert "arbitrary" not in done.err


def test_weights_in_safetensors(fx: Command, tmp_path: Path) -> None:
    stored = pytest.importorskip("safetensors.torch")
    path = tmp_path / "state.safetensors"
    stored.save_file(models.build().state_dict(), path)
    assert fx(*BASE, *DATA, "--weights", path).code == 0
    done = fx("quantize", path)
    assert done.code == 3
    assert "holds weights and no model" in done.err
    path.write_bytes(b"nonsense")
    assert fx(*BASE, *DATA, "--weights", path).code == 3


def test_what_cannot_be_pickled_leaves_no_file(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("older")
    done = fx("quantize", f"{M}:Unpicklable", *DATA, "--backend", "reference", "-o", path)
    assert done.code == 5
    assert "cannot be pickled" in done.err
    assert (os.listdir(tmp_path), path.read_text()) == (["model.pt"], "older")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_half_written(
    error: BaseException, fx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    path.write_text("older")

    def stop(made: object, stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]  # a binary file
        raise error

    monkeypatch.setattr(verb_quantize, "_save", stop)
    done = fx(*BASE, *DATA, "-o", path)
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert (os.listdir(tmp_path), path.read_text()) == (["model.pt"], "older")


@pytest.mark.parametrize("place", ["nowhere/model.pt", "."])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    place: str, fx: Command, tmp_path: Path
) -> None:
    done = fx(*BASE, *DATA, "-o", tmp_path / place)
    assert done.code == 2
    assert "noise" not in done.err


def test_pipes_are_written_to_and_not_replaced(fx: Command, tmp_path: Path) -> None:
    pipe, link, real = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "real.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(str(pipe), "text")
        assert os.read(reader, 99) == b"text\n"
    finally:
        os.close(reader)
    link.symlink_to(real)
    assert fx(*BASE, *DATA, "--report", link).code == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["coverage"] == 1.0


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="has no disk that is full")
def test_a_full_disk_is_told(fx: Command) -> None:
    done = fx(*BASE, *DATA, "-o", "/dev/full")
    assert done.code == 2
    assert "cannot write '/dev/full': No space left" in done.err
    assert Path("/dev/full").is_char_device()


def test_the_report_is_written(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert fx(*BASE, *DATA, "--report", path).code == 0
    assert json.loads(path.read_text())["coverage"] == 1.0
    assert path.stat().st_mode & 0o777 == 0o666 & ~_mask()
    path = tmp_path / "report.txt"
    assert fx(*BASE, *DATA, "--report", path).code == 0
    assert "linear+relu" in path.read_text()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_dry_run_plans_and_writes_nothing(fx: Command, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    words = (*BASE, *DATA, "--override", "2=float", "-o", path, "--dry-run")
    done = fx(*words)
    assert done.code == 0
    assert os.listdir(tmp_path) == []
    rows = [line.split() for line in done.out.splitlines()[2:4]]
    assert [row[:3] for row in rows] == [
        ["0", "linear+relu", "int8"],
        ["2", "linear", "float"],
    ]
    data = fx(*words, "--json").data
    assert list(data) == ["model", "dry_run", "settings", "output", "plan"]
    assert [op["int8"] for op in data["plan"]] == [True, False]


def test_patterns_of_ones_own(fx: Command) -> None:
    done = fx(*BASE, *DATA, "--pattern", f"{M}:double_linear", "--json")
    assert done.code == 0
    assert "double_linear" in [op["op"] for op in done.data["report"]["ops"]]
    assert fx(*BASE, *DATA, "--pattern", f"{M}:score").code == 2


def test_names_that_act_on_terminals_show_as_text(fx: Command) -> None:
    words = ("quantize", f"{M}:Hostile", *DATA, "--backend", "reference")
    for more in (
        (),
        ("--dry-run",),
        ("--override", "nowhere=float"),
        ("--override", "*red*=float"),
    ):
        done = fx(*words, *more)
        assert "\x1b" not in done.out + done.err
        assert "\u202e" not in done.out + done.err


def test_warnings_are_one_line(fx: Command) -> None:
    done = fx("quantize", f"{M}:build", *DATA, "--mode", "dynamic", "--backend", "reference")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "warning" in line]
    assert line.startswith("warning: mode 'dynamic' needs no calibration data")


def test_ctrl_c_in_the_users_code(fx: Command) -> None:
    done = fx("quantize", f"{M}:interrupts")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")
