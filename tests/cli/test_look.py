"""``report``, ``explain``, ``diff``, ``compare``, ``bench``, ``doctor``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fxquant.cli import verb_bench
from fxquant.cli.code import imported
from fxquant.errors import ConfigError
from tests.cli import models
from tests.cli.command import Command, M

ROOT = Path(__file__).resolve().parent.parent.parent
Q = f"{M}:quantized"
PAIR = ("compare", f"{M}:build", Q, "--data", f"{M}:loader")


def test_report(fx: Command, saved: Path) -> None:
    done = fx("report", Q)
    assert done.code == 0
    assert "linear+relu" in done.out
    assert fx("report", saved, "--trust-pickle", "--json").data["coverage"] == 1.0
    done = fx("report", f"{M}:build")
    assert done.code == 2
    assert "was not made by fxquant" in done.err


@pytest.mark.parametrize("selector", ["0", "re:0", "*", "torch.nn:ReLU"])
def test_explain(selector: str, fx: Command) -> None:
    done = fx("explain", Q, selector)
    assert done.code == 0
    assert done.out.startswith("0 (linear+relu): int8")
    assert fx("explain", Q, selector, "--json").data["ops"][0]["path"] == "0"


@pytest.mark.parametrize("selector", ["nowhere", "torch.nn:Nothing"])
def test_explain_of_nothing(selector: str, fx: Command) -> None:
    assert fx("explain", Q, selector).code == 2


def test_diff_of_one_model(fx: Command, tmp_path: Path) -> None:
    done = fx("diff", Q)
    assert done.code == 0
    assert "> fused" in done.out or "~ replaced" in done.out
    assert fx("diff", Q, "--exit-code").code == 1
    assert fx("diff", Q, "--exit-code", "--only", "0").code == 1
    done = fx("diff", Q, "--only", "nowhere")
    assert (done.code, done.out) == (2, "")
    assert "--only nowhere: neither graph has a module there: there are, for example" in done.err
    path = tmp_path / "diff.md"
    done = fx("diff", Q, "--markdown", "-o", path)
    assert done.out.startswith("- **")
    assert path.read_text() == done.out


def test_diff_of_two_models(fx: Command) -> None:
    same = ("diff", f"{M}:build", f"{M}:build", "--exit-code")
    assert fx(*same).code == 0
    assert fx(*same, "--json").data == {"differ": False, "changes": [], "unchanged": 5}
    other = ("diff", f"{M}:build", f"{M}:Holder.made", "--exit-code", "--json")
    done = fx(*other)
    assert done.code == 1
    assert done.data["differ"] is True
    assert {"kind", "path", "before", "after", "detail", "sqnr"} == set(done.data["changes"][0])


def test_diff_of_models_that_need_an_example(fx: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 8), np.float32))
    pair = ("diff", f"{M}:Branch", f"{M}:Branch", "--exit-code")
    assert fx(*pair).code == 3  # it cannot be captured
    assert fx(*pair, "--example-inputs", tmp_path / "x.npy").code == 0
    assert fx(*pair, "--example-inputs", tmp_path / "missing.npy").code == 4


def test_diff_is_coloured_on_terminals_alone(fx: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" not in fx("diff", Q).out
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[3" in fx("diff", Q).out
    assert "\x1b[" not in fx("diff", Q, "--markdown").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in fx("diff", Q).out
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: only when not empty
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in fx("diff", Q).out


def test_pages(fx: Command, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for words in (("report", Q), ("diff", Q), (*PAIR[:3], *PAIR[3:])):
        page.unlink(missing_ok=True)
        assert fx(*words, "--html", page).code == 0
        assert page.read_text().startswith("<!doctype html>")
        assert fx(*words, "--html", tmp_path / "nowhere" / "page.html").code == 2
    assert "Where the error comes from" in page.read_text()


def test_diff_with_data(fx: Command) -> None:
    words = ("diff", f"{M}:build", Q, "--data", f"{M}:loader")
    assert "SQNR" in fx(*words).out
    measured = [change["sqnr"] for change in fx(*words, "--json").data["changes"]]
    assert any(value is not None and value > 20 for value in measured)
    assert fx("diff", Q, "--data", f"{M}:loader").code == 2
    assert fx("diff", f"{M}:build", Q, "--max-batches", 1).code == 2


def test_compare(fx: Command, tmp_path: Path) -> None:
    x = torch.randn(24, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    made = []
    for factory in (models.build, models.quantized):
        torch.manual_seed(0)
        made.append(factory()(x).detach().double())
    noise, signal = (made[0] - made[1]).square().sum(), made[0].square().sum()
    words = ("compare", f"{M}:build", Q, "--data", tmp_path / "x.npy", "--batch-size", 8)
    assert fx(*words).code == 0
    data = fx(*words, "--json").data
    assert list(data) == ["batches", "outputs", "ops", "metric", "failed"]
    assert data["batches"] == 3
    (output,) = data["outputs"]
    # the same formula in one go: only the order of float64 sums differs
    assert output["sqnr_db"] == pytest.approx(float(10 * (signal / noise).log10()), rel=1e-9)
    assert output["elements"] == 3 * 8 * 4
    assert not output["equal"]
    assert fx(*PAIR, "--max-batches", 1, "--json").data["batches"] == 1


def test_compare_names_the_worst_ops(fx: Command) -> None:
    done = fx(*PAIR, "--worst", 1)
    assert done.code == 0
    assert "share" in done.out
    data = fx(*PAIR, "--worst", 1, "--json").data
    (op,) = data["ops"]
    assert op["path"] in ("0", "2")
    assert op["share"] > 0.2
    # The loader draws its batches: both passes see the same ones, so that both tell the same.
    assert fx(*PAIR, "--worst", 5, "--json").data["ops"][0] == op
    same = fx("compare", f"{M}:build", f"{M}:build", "--data", f"{M}:loader", "--worst", 1)
    assert same.code == 2
    assert "not made by fxquant" in same.err
    failed = fx(*PAIR, "--min-sqnr", 200).out
    assert "--worst 10 shows" in failed


def test_compare_of_a_model_with_itself(fx: Command) -> None:
    done = fx("compare", Q, Q, "--data", f"{M}:loader", "--min-sqnr", 200, "--json")
    assert done.code == 0
    (output,) = done.data["outputs"]
    # both start from the seed: a factory gives the same weights twice
    assert output["equal"]
    assert output["sqnr_db"] is None


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--min-sqnr", "20"), 0, ""),
        (("--min-sqnr", "200"), 1, "FAILED: output 0"),
        (("--metric", f"{M}:score", "--max-drop", "10"), 0, "metric"),
        (("--metric", f"{M}:score", "--max-drop", "-10"), 1, "FAILED: the metric drops"),
    ],
)
def test_compare_is_a_check(words: tuple[str, ...], code: int, said: str, fx: Command) -> None:
    done = fx(*PAIR, *words)
    assert done.code == code
    assert said in done.out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--max-drop", "1"), 2, "needs --metric"),
        (("--metric", f"{M}:LENGTH"), 2, "name a function"),
        (("--metric", f"{M}:fails"), 4, "could not measure"),
        (("--data", f"{M}:feed"), 2, "runs the model itself"),
        (("--data", f"{M}:empty"), 4, "0 batches"),
        (("--data", f"{M}:tears"), 4, "could not get data from tests.cli.models:tears: KeyError"),
        (("--data", f"{M}:pairs"), 4, "cannot take"),
        (("--data", f"{M}:pairs", "--transform", f"{M}:first"), 0, ""),
        (("--data", f"{M}:loader", "--transform", f"{M}:score"), 4, "could not transform batch 0"),
    ],
)
def test_compare_fails(words: tuple[str, ...], code: int, said: str, fx: Command) -> None:
    done = fx(*PAIR, *words)
    assert done.code == code
    assert said in done.err


def test_nan_of_the_int8_model_is_a_failed_check(fx: Command) -> None:
    done = fx("compare", f"{M}:build", f"{M}:poisoned", "--data", f"{M}:loader", "--json")
    assert done.code == 1
    assert done.data["outputs"][0]["sqnr_db"] is None
    assert not done.data["outputs"][0]["finite"]
    done = fx("compare", f"{M}:poisoned", f"{M}:build", "--data", f"{M}:loader")
    assert done.code == 4


def test_models_of_other_outputs_cannot_be_compared(fx: Command) -> None:
    done = fx("compare", f"{M}:build", f"{M}:Holder.made", "--data", f"{M}:loader")
    assert done.code == 4
    assert "different outputs: [(8, 4)] and [(8, 8)]" in done.err


def test_bench(fx: Command, tmp_path: Path, saved: Path) -> None:
    threads = torch.get_num_threads()
    quick = ("--rounds", 2, "--seconds", 0.001, "--backend", "reference")
    words = ("bench", f"{M}:build", "--calibration", f"{M}:loader", *quick)
    assert "median ms" in fx(*words).out
    data = fx(*words, "--rows", 1, "--threads", 1, "--json").data
    assert data["inputs"] == [[1, 8]]
    assert len(data["float_ms"]) == len(data["quantized_ms"]) == len(data["ratios"]) == 2
    assert set(data["median"]) == {"float_ms", "quantized_ms", "ratio"}
    assert data["threads"] == 1
    assert torch.get_num_threads() == threads
    assert fx(*words, "--threads", 10**6).code == 2
    np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float32))
    pair = ("bench", f"{M}:Holder.made", saved, "--trust-pickle", *quick)
    assert fx(*pair, "--example-inputs", tmp_path / "x.npy").code == 0
    assert fx(*pair).code == 2
    assert fx("bench", f"{M}:build", "--calibration", f"{M}:feed", *quick).code == 2


def test_who_begins_changes_from_round_to_round() -> None:
    ran: list[str] = []
    runs = (lambda: ran.append("a"), lambda: ran.append("b"))
    rounds = verb_bench.in_turns(runs, 4, 1e-12)
    assert len(rounds) == 4
    assert "".join(ran[6:]) == "abbaabba"  # three runs of each to see how long one takes


def test_doctor(fx: Command) -> None:
    done = fx("doctor")
    assert done.code == 0
    for said in ("torch", "avx512_vnni", "threads", "reference", "extra demo"):
        assert said in done.out
    data = fx("doctor", "--json").data
    assert {
        "fxquant",
        "python",
        "machine",
        "onednn",
        "versions",
        "extras",
        "backends",
        "adds_pairs",
    } == set(data)
    assert data["versions"]["torch"] is not None
    assert "dev" not in data["extras"]
    assert data["adds_pairs"] in (True, False, None)
    assert ("pairs of 16 bits" in done.out) == bool(data["adds_pairs"])


def test_import_refuses_in_words() -> None:
    assert imported("os.path:join", ConfigError, "it") is os.path.join
    with pytest.raises(ConfigError, match="did you mean 'join'"):
        imported("os.path:joim", ConfigError, "it")


def test_help_shows_examples_and_statuses(fx: Command) -> None:
    done = fx("--help")
    assert done.code == 0
    assert "fxquant quantize mymodels:build" in done.out
    assert "130 interrupted" in done.out
    done = fx("compare", "--help")
    assert "--max-drop 0.01" in done.out


def test_ctrl_c_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def build():\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "fxquant", "quantize", "slow:build", "-o", "model.pt"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background may ignore it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while not (tmp_path / "started").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "model.pt").exists()
