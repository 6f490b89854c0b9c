"""Data in files: arrays by place and by name, folders, splitting, and files that are none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxquant.cli.data import Files, load_data, read
from fxquant.errors import CalibrationError
from tests.cli.command import Command, M


def shapes(value: Any) -> Any:
    """The shapes in a batch."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: shapes(each) for name, each in value.items()}
    return [shapes(each) for each in value]


def test_npy_is_a_tensor_and_doubles_become_floats(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.arange(6.0).reshape(2, 3))
    held = read(path)
    assert held.dtype is torch.float32
    assert torch.equal(held, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">i8", "|u1", "|b1", "<u2"])
def test_byte_orders_and_types(dtype: str, tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.array([[0, 1], [1, 0]], dtype=dtype))
    assert read(path).tolist() == [[0, 1], [1, 0]]


def test_layouts(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)))
    assert read(path).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_npz_by_place_by_name_and_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npz")
    a, b = np.zeros((2, 3), np.float32), np.zeros((2, 5), np.float32)
    np.savez(path, *[a] * 11, b)
    held = read(path)
    assert isinstance(held, tuple)
    assert shapes(held) == [(2, 3)] * 11 + [(2, 5)]  # arr_10 stands behind arr_9
    np.savez(path, a=a, b=b)
    assert shapes(read(path)) == {"a": (2, 3), "b": (2, 5)}
    np.savez_compressed(path, images=a)
    assert shapes(read(path)) == (2, 3)


def test_safetensors(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, path)
    assert shapes(read(path)) == {"a": (2, 3), "b": (2,)}


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="holds no array of numbers"):
        read(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff"])
def test_files_that_hold_no_arrays(ending: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read(str(path))


def test_strings_and_empty_archives(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.array(["a", "b"]))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read(path)
    np.savez(tmp_path / "x.npz")
    with pytest.raises(CalibrationError, match="holds no array"):
        read(str(tmp_path / "x.npz"))


def folder(tmp_path: Path, count: int) -> Path:
    """Batches of 6 in files, and a file that is none."""
    for number in range(count):
        np.save(tmp_path / f"{number:02}.npy", np.full((6, 8), number, np.float32))
    (tmp_path / "README").write_text("about")
    return tmp_path


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    held = load_data(str(folder(tmp_path, 12)))
    assert isinstance(held, Files)
    assert [int(batch[0, 0]) for batch in held] == list(range(12))
    with pytest.raises(CalibrationError, match="holds no data"):
        load_data(str(_empty(tmp_path)))


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_files_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("fxquant.cli.data.read", lambda path: drawn.append(path))
    iterator = iter(load_data(str(folder(tmp_path, 3))))
    assert drawn == []
    next(iterator)
    assert len(drawn) == 1


def test_splitting(tmp_path: Path) -> None:
    held = load_data(str(folder(tmp_path, 2)), 4)
    assert [len(batch) for batch in held] == [4, 2, 4, 2]
    np.savez(tmp_path / "00.npz", a=np.zeros((3, 2)), b=np.ones(3))
    named = list(load_data(str(tmp_path / "00.npz"), 2))
    assert shapes(named) == [{"a": (2, 2), "b": (2,)}, {"a": (1, 2), "b": (1,)}]
    np.savez(tmp_path / "00.npz", np.zeros((3, 2)), np.ones(3))
    assert shapes(list(load_data(str(tmp_path / "00.npz"), 3))) == [[(3, 2), (3,)]]
    np.savez(tmp_path / "00.npz", a=np.zeros((3, 2)), b=np.ones(4))
    with pytest.raises(CalibrationError, match="differ in their first"):
        list(load_data(str(tmp_path / "00.npz"), 2))
    np.save(tmp_path / "00.npy", np.float32(1))
    with pytest.raises(CalibrationError, match="a single number"):
        list(load_data(str(tmp_path / "00.npy"), 2))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("1,2")
    with pytest.raises(CalibrationError, match="are to end with"):
        load_data(str(path))


def test_calibration_from_files_end_to_end(fx: Command, tmp_path: Path) -> None:
    words = (
        "quantize",
        f"{M}:build",
        "--backend",
        "reference",
        "--calibration",
        folder(tmp_path, 3),
    )
    assert fx(*words).code == 0
    assert fx(*words, "--batch-size", 2, "--max-batches", 1).code == 0
    assert fx(*words, "--example-inputs", tmp_path / "00.npy").code == 0


def test_inputs_by_name_end_to_end(fx: Command, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 8))
    np.savez(tmp_path / "x.npz", a=x, b=x)
    words = ("quantize", f"{M}:Pair", "--backend", "reference", "--calibration")
    assert fx(*words, tmp_path / "x.npz").code == 0
    assert fx(*words, tmp_path / "x.npz", "--example-inputs", tmp_path / "x.npz").code == 0
    np.savez(tmp_path / "x.npz", a=x, wrong=x)
    done = fx(*words, tmp_path / "x.npz")
    assert done.code == 4
    assert "cannot take" in done.err


def test_without_numpy_the_extra_is_named(
    fx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 8), np.float32))
    monkeypatch.setitem(sys.modules, "numpy", None)
    done = fx("quantize", f"{M}:build", "--calibration", tmp_path / "x.npy")
    assert done.code == 5
    assert "pip install fxquant[cli]" in done.err
