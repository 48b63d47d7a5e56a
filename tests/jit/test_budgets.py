"""Budgets of the shipped kernels: warnings, spills, shared memory; each is documented."""

from __future__ import annotations

import json

import pytest

from cuflash.jit import compile_cubin, resources
from cuflash.plan.arch import ARCHS
from cuflash.plan.config import ForwardConfig
from cuflash.plan.shipped import DTYPES, shipped_configs
from docs import make_resources


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_shipped_kernel_spills_or_warns(arch, dtype):
    """Not one byte, on any architecture."""
    broken = {}
    for config in shipped_configs(arch, [dtype]):
        log = json.loads(compile_cubin(config, arch).with_suffix(".json").read_text())["log"]
        used = resources(config, arch)
        if used.stack or used.spill_loads or used.spill_stores or "warning" in log:
            broken[config] = log
    assert broken == {}


def test_every_shipped_kernel_fits_into_shared_memory():
    for config, arch in make_resources.jobs():
        assert make_resources.shared_bytes(config) <= ARCHS[arch].shared_per_block


def test_every_shipped_kernel_is_documented():
    text = make_resources.TARGET.read_text(encoding="utf-8")
    places = {make_resources.place(config, arch) for config, arch in make_resources.jobs()}
    assert set(make_resources.cells_in(text)) == places, "run: python docs/make_resources.py --missing"
    assert "spills" not in text.partition("## Forward")[2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_forward_kernels_of_wide_dtypes_do_not_spill(arch, dtype):
    """Beyond the sums that float32 keeps in local memory, and two registers beside hundreds of products a tile."""
    spilling = {}
    for config in shipped_configs(arch, [dtype], [64, 128]):
        if not isinstance(config, ForwardConfig):
            continue
        used = resources(config, arch)
        if max(used.spill_loads, used.spill_stores) > 8:
            spilling[config] = used
    assert spilling == {}
