"""Report and History: what a record holds, told in full, the same every time."""

from __future__ import annotations

import json

import pytest
import torch

from fxquant.errors import ConfigError, FxQuantError
from fxquant.graph.diff import GraphState, NodeState
from fxquant.graph.edit import Edit
from fxquant.graph.info import QType
from fxquant.graph.state import Ref
from fxquant.graph.verify import Stage
from fxquant.numerics.observers import ObserverSummary
from fxquant.record import OpRecord, Record, Snapshot, Timing
from fxquant.report.history import History
from fxquant.report.report import Report
from tests.report.test_tables import HOSTILE

CODES = QType(0.25, 3, 0, 255, torch.uint8)


def op(
    path: str,
    int8: bool = True,
    weights: int = 0,
    why: str = "x86 has a kernel",
    macs: int | None = None,
) -> OpRecord:
    """An op record."""
    return OpRecord(
        path=path,
        op="conv2d+relu",
        int8=int8,
        why=why,
        by="x86",
        kernel="X86Conv" if int8 else "float",
        reads=(CODES, None),
        weight="int8 per channel 0",
        writes=CODES if int8 else None,
        weights=weights,
        macs=macs,
    )


def seen(path: str, clipped: float) -> ObserverSummary:
    """An observer's summary."""
    return ObserverSummary(
        path, "histogram", 2, 64, -1.0, 1.0, -0.9, 0.9, clipped, (1, 2), "float32"
    )


def full_record() -> Record:
    """A record with everything in it."""
    nodes = (
        NodeState("x", "placeholder", "input", "x", (), ()),
        NodeState("relu", "call_function", "relu", "torch.relu", (Ref("x"),), ()),
    )
    return Record(
        mode="static",
        backend="x86",
        rung="torch.fx symbolic tracing",
        snapshots=[
            Snapshot("capture", Stage.CAPTURED, (), 0.25, GraphState(nodes[:1])),
            Snapshot(
                "fuse",
                Stage.FUSED,
                (Edit("conv-relu", (), ()), Edit("drop", (), ()), Edit("conv-relu", (), ())),
                0.0125,
                GraphState(nodes),
                (("conv-bn", "layer1.bn", "bn has a second user"), ("linear-bn", "fc", "no")),
            ),
        ],
        ops=(
            op("conv1", weights=300, macs=6000),
            op("conv2", weights=90, macs=3600),
            op("head", False, 10, "asked to", macs=400),
        ),
        observers=(seen("conv1", 0.001), seen("conv2", 0.02)),
        unseen=("branch.a", "branch.b"),
        bytes_before=1600,
        bytes_after=448,
        timing=Timing(20.0, 5.0),
    )


def test_coverage_counts_ops_and_weights() -> None:
    report = Report(full_record())
    assert report.coverage == 2 / 3
    assert report.weight_coverage == 0.975
    assert report.mac_coverage == 0.96
    assert report.ratio == 0.28


def test_text_has_one_row_an_op_and_all_facts() -> None:
    text = str(Report(full_record()))
    rows = text.splitlines()[2:5]
    assert rows[0].split() == [
        *("conv1", "conv2d+relu", "int8", "6000", "uint8,", "float", "int8", "per", "channel", "0"),
        *("uint8", "0.25", "3", "X86Conv"),
    ]
    assert rows[2].split()[:3] == ["head", "conv2d+relu", "float"]
    assert rows[2].endswith("asked to")
    assert text.split("\n\n")[1].splitlines() == [
        "int8: 2 of 3 ops (66.7%), 97.5% of 400 weight elements, "
        "96.0% of 10000 multiply-accumulates",
        "size: 1600 -> 448 bytes (0.280x)",
        "mode static, backend x86, captured by torch.fx symbolic tracing",
        "calibrated at 2 places, at most 2.000% of the values clipped (at conv2)",
        "never reached by calibration: branch.a, branch.b",
        "one forward of batch 1: 20.000 ms in float, 5.000 ms converted (0.25x)",
    ]


def test_work_that_is_not_known_is_marked_and_left_out() -> None:
    record = full_record()
    record.ops = (op("a", macs=30), op("b", False, macs=10), op("c", False), op("d", macs=0))
    report = Report(record)
    assert report.mac_coverage == 0.75
    assert [row["macs"] for row in report.rows] == [30, 10, None, 0]
    assert [line.split()[3] for line in str(report).splitlines()[2:5]] == ["30", "10", "?"]


def test_text_and_dict_repeat_exactly() -> None:
    assert str(Report(full_record())) == str(Report(full_record()))
    first, again = (json.dumps(Report(full_record()).to_dict()) for _ in range(2))
    assert first == again


def test_dict_holds_exact_types_and_stable_keys() -> None:
    record = full_record()
    scale = 0.1 + 0.2  # a float that 6 digits do not hold
    record.ops = (
        OpRecord("a", "add", True, "", "", "", writes=QType(scale, 0, 0, 255, torch.uint8)),
    )
    plain = json.loads(json.dumps(Report(record).to_dict()))
    assert plain["ops"][0]["out"]["scale"] == scale
    assert plain["ops"][0]["out"]["dtype"] == "uint8"
    assert set(plain) == {
        *("mode", "backend", "capture", "parts", "coverage", "weight_coverage", "mac_coverage"),
        *("bytes_before", "bytes_after", "unseen", "clipped", "timing", "ops"),
    }


def test_nothing_converted_yet() -> None:
    report = Report(Record("static"))
    assert str(report).startswith("nothing is converted yet")
    assert (report.coverage, report.weight_coverage, report.rows) == (0.0, 1.0, ())
    json.dumps(report.to_dict())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_no_harm(name: str) -> None:
    record = full_record()
    record.ops = (op(name, False, why=name),)
    record.unseen = (name,)
    record.observers = (seen(name, 0.5),)
    lines = str(Report(record)).split("\n")
    assert len(lines) == 3 + 1 + 6
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_history_is_a_series_of_snapshots() -> None:
    record = full_record()
    history = History(record)
    assert len(history) == 2
    assert list(history) == record.snapshots
    assert history["fuse"] is history[1] is history[-1]
    assert "fuse" in history
    assert "fusion" not in history
    assert history.names == ("capture", "fuse")


def test_history_has_the_text_before_and_after_a_pass() -> None:
    history = History(full_record())
    assert history.before("fuse") == history.after("capture") == "%x = input(x)"
    assert history.after("fuse") == "%x = input(x)\n%relu = relu(%x)"
    assert history.before("capture") == ""
    assert [change.kind for change in history.diff("fuse").changes] == ["added"]
    assert not history.diff("capture")


def test_history_text_counts_rules() -> None:
    lines = str(History(full_record())).splitlines()
    assert lines[2].split() == ["capture", "captured", "1", "0", "250.0"]
    assert lines[3].split() == ["fuse", "fused", "2", "3", "conv-relu", "2,", "drop", "1", "12.5"]
    assert lines[-1] == "2 near misses of rules: see .near()"


def test_near_misses_by_rule() -> None:
    history = History(full_record())
    assert len(history.near()) == 2
    assert history.near("conv-bn") == (("conv-bn", "layer1.bn", "bn has a second user"),)
    assert history.near("none") == ()


def test_an_unknown_pass_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'fusee'; did you mean 'fuse'\? .* capture, fuse"):
        History(full_record()).before("fusee")
    with pytest.raises(FxQuantError):
        History(full_record())["zzz"]
