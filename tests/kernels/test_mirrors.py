"""The CUDA structs against their Python mirrors: fields, order, offsets, sizes, shared memory."""

import re
from dataclasses import dataclass, fields

import pytest

from cuflash.jit import compile_ptx
from cuflash.jit.sources import sources
from cuflash.masks.program import MAX_REALS, MAX_TABLES, MAX_WHOLES
from cuflash.plan import backward_cost
from cuflash.plan.config import (
    ELEMENT_NAMES,
    MAX_SPLITS,
    BackwardConfig,
    BiasGradientConfig,
    CombineConfig,
    ForwardConfig,
    TileRowsConfig,
)
from cuflash.plan.cost import shared_bytes
from cuflash.plan.kernel import KernelConfig
from cuflash.plan.params import (
    BACKWARD_PARAMS,
    COMBINE_PARAMS,
    FORWARD_PARAMS,
    MERGE_PARAMS,
    MOVE_ROWS_PARAMS,
    NO_BOUND,
    SORT_TOKENS_PARAMS,
    TILE_LIST_PARAMS,
    VISIBLE_RANGES_PARAMS,
)
from cuflash.plan.shipped import shipped_configs
from cuflash.plan.token_config import MoveRowsConfig, SortTokensConfig, VisibleRangesConfig

RECORDS = {
    "ForwardParams": FORWARD_PARAMS,
    "BackwardParams": BACKWARD_PARAMS,
    "TileListParams": TILE_LIST_PARAMS,
    "CombineParams": COMBINE_PARAMS,
    "MergeParams": MERGE_PARAMS,
    "SortTokensParams": SORT_TOKENS_PARAMS,
    "VisibleRangesParams": VISIBLE_RANGES_PARAMS,
    "MoveRowsParams": MOVE_ROWS_PARAMS,
}
CONFIGS = (
    ForwardConfig,
    BackwardConfig,
    BiasGradientConfig,
    TileRowsConfig,
    CombineConfig,
    SortTokensConfig,
    VisibleRangesConfig,
    MoveRowsConfig,
)
MEMBER = re.compile(r"^\s+(?:const )?(\w+)(?: ?(\*))? ?(\*?)(\w+)(?:\[([\w *]+)\])?;", re.M)


def members(header: str, struct: str) -> list[re.Match]:
    """Declarations of a struct, in order."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", sources()[header], re.S)
    assert body is not None
    return list(MEMBER.finditer(body[1]))


@dataclass(frozen=True)
class Constants:
    """A unit that holds named values, which its PTX then shows."""

    includes: tuple[str, ...]
    values: tuple[tuple[str, str], ...]  # name, CUDA expression
    addresses: tuple[tuple[str, str], ...] = ()  # name, member of `object`
    object: str = "int"  # a type
    entry: str = "constants"

    def unit(self) -> str:
        lines = [f'#include "{path}"' for path in self.includes]
        lines += [f'extern "C" __constant__ long long {name} = {value};' for name, value in self.values]
        lines += [f'extern "C" __device__ {self.object} object;']
        lines += [f'extern "C" __device__ void* {name} = &object.{member};' for name, member in self.addresses]
        return "\n".join([*lines, 'extern "C" __global__ void constants() {}'])


def values_of(includes: list[str], expressions: dict[str, str]) -> dict[str, int]:
    """CUDA expressions evaluated by the compiler."""
    names = {f"value_{i}": name for i, name in enumerate(expressions)}
    unit = Constants(tuple(includes), tuple((key, expressions[name]) for key, name in names.items()))
    found = re.findall(r"(value_\d+)(?: = (-?\d+))?;", compile_ptx(unit, "sm_80"))
    return {names[key]: int(value or 0) for key, value in found}


def offsets_of(header: str, struct: str, names: list[str]) -> dict[str, int]:
    """Where members lie, by addresses that the compiler forms: not every version of it knows offsetof."""
    members = {f"address_{i}": name for i, name in enumerate(names)}
    unit = Constants((header,), (), tuple(members.items()), f"cuflash::{struct}")
    found = re.findall(r"(address_\d+) = generic\(object\)(?:\+(\d+))?;", compile_ptx(unit, "sm_80"))
    return {members[key]: int(offset or 0) for key, offset in found}


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_have_the_same_fields(config):
    kinds = {"Element": "str", "int": "int", "bool": "bool"}
    struct = "TileListConfig" if config is TileRowsConfig else config.__name__
    declared = [(m[4], kinds[m[1]]) for m in members("attention/config.cuh", struct)]
    # Of a mask a kernel knows whether there is one; its text is in the unit.
    assert declared == [(f.name, "bool" if f.name == "mask" else f.type) for f in fields(config)]


def test_element_names_are_in_the_order_of_the_enumeration():
    declared = re.search(r"enum class Element {(.*?)}", sources()["tile/element.cuh"])
    assert declared is not None
    assert tuple(name.strip() for name in declared[1].split(",")) == ELEMENT_NAMES


@pytest.mark.parametrize("struct", RECORDS)
def test_parameters_have_the_same_fields(struct):
    assert [m[4] for m in members("attention/params.cuh", struct)] == list(RECORDS[struct].names)


@pytest.mark.parametrize("struct", RECORDS)
def test_parameters_have_the_same_offsets_and_sizes(struct):
    record = RECORDS[struct]
    header = "attention/params.cuh"
    sizes = {name: f"sizeof(static_cast<cuflash::{struct}*>(nullptr)->{name})" for name in record.names}
    expected = {name: record.fields[name][0].itemsize for name in record.names}
    assert values_of([header], sizes | {"size": f"sizeof(cuflash::{struct})"}) == expected | {"size": record.itemsize}
    assert offsets_of(header, struct, list(record.names)) == {name: record.fields[name][1] for name in record.names}


def test_parameters_fit_into_a_launch():
    assert max(record.itemsize for record in RECORDS.values()) <= 4096


def test_constants_agree():
    sizes = {"kMaxSplits": MAX_SPLITS, "kMaxTables": MAX_TABLES, "kMaxWholes": MAX_WHOLES, "kMaxReals": MAX_REALS}
    found = values_of(["attention/params.cuh"], {name: f"cuflash::{name}" for name in sizes})
    assert found == sizes
    assert NO_BOUND == 2**31 - 1


def literal(config: KernelConfig) -> str:
    """The configuration as its compile unit spells it."""
    spelled = re.search(r"constexpr (cuflash::\w+) kConfig({.*?});", config.unit(), re.S)
    assert spelled is not None
    return spelled[1] + spelled[2]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_shared_memory_is_that_of_the_kernel(arch):
    configs = [config for config in shipped_configs(arch) if isinstance(config, ForwardConfig)]
    sizes = {str(config): f"sizeof(cuflash::ForwardShared<{literal(config)}>)" for config in configs}
    assert values_of(["kernels/forward.cu"], sizes) == {str(config): shared_bytes(config) for config in configs}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize(("family", "struct"), [("backward", "Backward"), ("bias_gradient", "BiasGradient")])
def test_shared_memory_of_the_backward_kernels(arch, family, struct):
    configs = [config for config in shipped_configs(arch) if config.family == family]
    sizes = {str(config): f"sizeof(cuflash::{struct}Shared<{literal(config)}>)" for config in configs}
    expected = {str(config): backward_cost.shared_bytes(config) for config in configs}
    assert values_of([f"kernels/{family}.cu"], sizes) == expected


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_sums_of_dq_are_as_large_as_in_the_kernel(arch):
    configs = [config for config in shipped_configs(arch) if config.family == "backward"]
    sizes = {str(config): f"cuflash::QueryGradient<{literal(config)}>::kTileSums" for config in configs}
    expected = {str(config): backward_cost.dq_tile_sums(config) for config in configs}
    assert values_of(["kernels/backward.cu"], sizes) == expected


def test_asm_is_in_ptx_alone_and_nothing_is_included_from_outside():
    for name, text in sources().items():
        if not name.startswith("ptx/"):
            assert "asm" not in re.findall(r"\b\w+\b", re.sub(r"//.*", "", text)), name
        assert "#include <" not in text, name
        layers = ("ptx", "tile", "attention", "kernels")
        for included in re.findall(r'#include "(\w+)/', text):
            assert layers.index(included) <= layers.index(name.split("/")[0]), f"{name} includes {included}"
