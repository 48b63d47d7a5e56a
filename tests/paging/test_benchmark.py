"""The benchmark of the bookkeeping runs; what it measures is no test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import paging


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paging.main(["--sequences", "40", "--repeats", "2", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "paging.json").read_text())
    assert result["sequences"] == 40
    assert {len(samples) for samples in result["microseconds"].values()} == {2}
    assert capsys.readouterr().out.count(" us\n") == len(result["microseconds"])
