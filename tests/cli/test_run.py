"""The command line: what goes to which stream, exit codes, and no traceback unless asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import fxquant
from fxquant import errors
from fxquant.cli import main, run
from fxquant.cli.verb import Answer, Verb

ROOT = Path(__file__).resolve().parent.parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in the checkout."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def install(monkeypatch: pytest.MonkeyPatch, does: Callable[[], Answer], extra: str = "") -> None:
    """Make ``probe`` the only verb."""
    verb = Verb("probe", "for tests", lambda arguments: does(), extra=extra)
    monkeypatch.setattr(run, "VERBS", (verb,))


def fail_with(error: BaseException) -> Callable[[], Answer]:
    """A verb that raises ``error``."""

    def fail() -> Answer:
        raise error

    return fail


def test_python_m_is_the_command() -> None:
    done = python("-m", "fxquant", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fxquant {fxquant.__version__} (torch ")


def test_backends_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    listed = {line.split()[0]: line.split()[1] for line in out.splitlines()[2:]}
    assert listed == {b.name: "yes" if b.available else "no" for b in fxquant.backends()}
    assert all(b.reason in out for b in fxquant.backends())


def test_backends_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fxquant"] == fxquant.__version__
    found = {entry["name"]: entry["available"] for entry in data["backends"]}
    assert found == {b.name: b.available for b in fxquant.backends()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["backend"], "invalid choice: 'backend'"),
        (["quantise"], "did you mean 'quantize'?"),
        (["quantize", "m:f", "--overide", "head=float"], "did you mean '--override'?"),
        (["quantize", "m:f", "--mode", "dynamik"], "did you mean 'dynamic'?"),
        (["quantize", "m:f", "--max-batches", "0"], "0 is less than 1"),
        (["quantize", "m:f", "--min-coverage", "1.5"], "1.5 is not between 0 and 1"),
        (["quantize", "m:f", "--calib", "x"], "did you mean '--calibration'?"),  # not abbreviated
        (["quantize", "m:f", "\x1b[31m"], "\\x1b[31m"),
        (["bench", "m:f", "--seconds", "0"], "0 is not more than 0"),
        (["compare", "a:b", "c:d", "--data", "x", "--min-sqnr", "nan"], "nan is not finite"),
        (["demo", "--epochs", "0"], "0 is less than 1"),
        (["demo", "--epochs", "many"], "'many' is not a whole number"),
        (["demo", "--seed", "-1"], "-1 is not between"),
        (["demo", "--seed", str(2**63)], "is not between"),
        (["backends", "--seed", "1"], "unrecognized arguments"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("usage: fxquant")
    assert said in err


@pytest.mark.parametrize("options", [[], ["--seed", "7"], ["--epochs", "2"]])
def test_demo_gets_its_options_and_keeps_progress_from_stdout(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got: dict[str, int] = {}

    def demo(*, seed: int, epochs: int, say: Callable[[str], None]) -> SimpleNamespace:
        got.update(seed=seed, epochs=epochs)
        say("progress")
        return SimpleNamespace(to_dict=lambda: {"seed": seed})

    monkeypatch.setitem(sys.modules, "fxquant.demo", SimpleNamespace(run=demo, EPOCHS=3))
    assert main(["demo", "--json", *options]) == 0
    assert got == {
        "seed": 7 if "--seed" in options else 0,
        "epochs": 2 if "--epochs" in options else 3,
    }
    out, err = capsys.readouterr()
    assert json.loads(out) == {"seed": got["seed"]}
    assert err == "progress\n"


def test_demo_without_scikit_learn_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fxquant.demo", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert "needs sklearn" in err
    assert "pip install fxquant[demo]" in err
    assert len(err.splitlines()) == 1


def test_only_the_demo_needs_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; from fxquant.cli import main; "
        "main(['backends']); sys.exit(bool({'fxquant.demo', 'scipy'} & sys.modules.keys()))"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigError("why"), 2),
        (errors.PatternError("why"), 2),
        (errors.TraceError("why"), 3),
        (errors.LoadError("why"), 3),
        (errors.CalibrationError("why"), 4),
        (errors.LoweringError("why"), 5),
        (errors.GuardError("why"), 5),
    ],
)
def test_errors_on_purpose_have_their_codes_and_one_line(
    error: errors.FxQuantError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, fail_with(error))
    assert main(["probe"]) == status
    assert capsys.readouterr() == ("", "error: why\n")


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        errors.VerifyError("a pass left a broken graph"),
        errors.QParamError("scale 0"),
        ModuleNotFoundError("No module named 'fxquant.gone'", name="fxquant.gone"),
    ],
)
def test_bugs_end_with_70_and_say_how_to_report(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, fail_with(error), extra="demo")
    assert main(["probe"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {type(error).__name__}: {error}\n")
    assert "fxquant doctor" in err and "fxquant probe" in err
    assert "Traceback" not in err


def test_a_missing_module_that_no_extra_brings_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fail_with(ModuleNotFoundError("No module named 'gone'", name="gone")))
    assert main(["probe"]) == 70


@pytest.mark.parametrize("arguments", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_shows_the_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, fail_with(ZeroDivisionError("division by zero")))
    assert main(arguments) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "raise error" in err


def test_ctrl_c_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, fail_with(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_verb_can_choose_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, lambda: Answer("they differ", {"same": False}, code=1))
    assert main(["probe"]) == 1
    assert capsys.readouterr() == ("they differ\n", "")


def test_a_reader_that_stops_early_is_no_error() -> None:
    code = (
        "import sys; from fxquant.cli import run; from fxquant.cli.verb import Answer, Verb; "
        "answer = lambda arguments: Answer('x' * 1_000_000, {}); "
        "run.VERBS = (Verb('probe', '', answer),); sys.exit(run.main(['probe']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    helped = capsys.readouterr().out
    assert run.VERBS
    for verb in run.VERBS:
        assert f"    {verb.name} " in helped
        assert verb.help in helped
