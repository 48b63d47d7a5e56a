"""Kernel configurations: the compile-time constants of each kernel family, mirrored by one CUDA struct each."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.plan.kernel import KernelConfig

ELEMENT_NAMES = ("none", "float16", "bfloat16", "float32", "float64", "tf32")  # order of `enum class Element` in CUDA
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "tf32": 4}
ARRAY_DTYPES = ELEMENT_NAMES[1:5]  # tf32 is no dtype: float32 whose products are of TF32

MAX_SPLITS = 128  # partial states that one combine launch merges


def state_dtype(dtype: str) -> str:
    """Of lse and of partial states, for inputs of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ForwardConfig(KernelConfig):
    """Compile-time constants of the forward kernel; field order is that of the CUDA struct of the same name.

    head_dim and head_dim_v are exact: the kernel pads its tiles, never its inputs. A block computes block_m queries
    against tiles of block_n keys for block_dv of the head_dim_v output columns.
    """

    dtype: str  # q, k, v and (unless split) o: float16, bfloat16, float32, float64 or tf32
    bias_dtype: str  # "none" without a bias
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    block_dv: int
    num_warps: int
    num_stages: int  # key/value tiles in flight
    q_in_registers: bool
    load_bytes: int  # widest access every row of q, k and v is aligned to: 16, 8, 4 or 2
    store_bytes: int  # the same for o, or the partial states
    windowed: bool
    softcapped: bool
    varlen: bool
    split: bool  # writes partial states (float32, float64 for float64) for the combine kernel
    mask: str = ""  # its C++, `cuflash.masks.program.Program.code`; key tiles then come from lists
    paged: bool = False  # keys and values lie in the blocks that a table names
    grouped: bool = False  # rows of a tile are the query heads of a group, token after token
    even: bool = False  # split; blocks take shares of about the same size of all sequences' keys

    family = "forward"
    record = "Forward"
    resident = 1  # one suffices: else ptxas spills where that lets one more reside

    def __post_init__(self) -> None:
        require = self.require
        require(self.dtype in ELEMENT_NAMES[1:], "dtype", f"one of {ELEMENT_NAMES[1:]}")
        require(self.bias_dtype in ("none", *ARRAY_DTYPES), "bias_dtype", f"one of {('none', *ARRAY_DTYPES)}")
        require(1 <= self.head_dim <= 512, "head_dim", "1 to 512")
        require(1 <= self.head_dim_v <= 512, "head_dim_v", "1 to 512")
        require(self.num_warps in (1, 2, 4, 8), "num_warps", "1, 2, 4 or 8")
        require(
            self.block_m > 0 and self.block_m % (16 * self.num_warps) == 0,
            "block_m",
            f"a multiple of 16 * num_warps = {16 * self.num_warps}",
        )
        require(self.block_n > 0 and self.block_n % 16 == 0, "block_n", "a multiple of 16")
        require(self.block_dv % 16 == 0 and 16 <= self.block_dv <= 256, "block_dv", "a multiple of 16 up to 256")
        require(self.num_stages in (1, 2), "num_stages", "1 or 2")
        widths = tuple(width for width in (2, 4, 8, 16) if width >= ELEMENT_BYTES[self.dtype])
        require(self.load_bytes in widths, "load_bytes", f"one of {widths}")
        require(self.store_bytes in widths, "store_bytes", f"one of {widths}")

    @property
    def entry(self) -> str:
        return f"cuflash_forward_d{self.head_dim}_{self.head_dim_v}_{self.block_m}x{self.block_n}"


@dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """Compile-time constants of the backward pass's kernels; field order is that of the CUDA struct of the same name.

    A block owns block_n keys and visits tiles of block_m queries. It computes block_d columns of dq and dk and block_dv
    of dv: all of them, or a multiple of 64 where registers do not suffice for all.
    """

    dtype: str  # q, k, v, out, their cotangents and gradients: as in ForwardConfig
    bias_dtype: str  # "none" without a bias
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    key_warps: int  # of them, side by side along the keys; the others share the queries of scores, the columns of sums
    num_stages: int  # query tiles in flight
    load_bytes: int  # widest access every row of q, k, v, out and its cotangent is aligned to: 16, 8, 4 or 2
    store_bytes: int  # the same for dq, dk and dv
    windowed: bool
    softcapped: bool
    varlen: bool
    deterministic: bool  # key tiles add to dq in their order
    mask: str = ""  # as in ForwardConfig; query tiles then come from lists

    family = "backward"
    record = "Backward"
    resident = 1

    def __post_init__(self) -> None:
        require = self.require
        require(self.dtype in ELEMENT_NAMES[1:], "dtype", f"one of {ELEMENT_NAMES[1:]}")
        require(self.bias_dtype in ELEMENT_NAMES, "bias_dtype", f"one of {ELEMENT_NAMES}")
        require(1 <= self.head_dim <= 512, "head_dim", "1 to 512")
        require(1 <= self.head_dim_v <= 512, "head_dim_v", "1 to 512")
        require(self.num_warps in (1, 2, 4, 8), "num_warps", "1, 2, 4 or 8")
        require(
            self.key_warps in (1, 2, 4, 8) and self.num_warps % self.key_warps == 0,
            "key_warps",
            f"1, 2, 4 or 8 and divide num_warps = {self.num_warps}",
        )
        element_bytes = ELEMENT_BYTES[self.dtype]
        require(
            element_bytes == 2 or self.key_warps == self.num_warps,
            "key_warps",
            f"num_warps = {self.num_warps} for elements of more than 16 bits",
        )
        require(
            self.block_n > 0 and self.block_n % (16 * self.key_warps) == 0,
            "block_n",
            f"a multiple of 16 * key_warps = {16 * self.key_warps}",
        )
        least = 16 * self.num_warps // self.key_warps  # queries and columns of the warps that share them
        require(
            self.block_m in (16, 32, 64, 128) and self.block_m >= least,
            "block_m",
            f"16, 32, 64 or 128, and at least 16 for each of the warps that share it: {least}",
        )
        most = 16 * self.threads // (8 if self.dtype == "float64" else 4)
        require(self.block_m <= most, "block_m", f"at most {most}, for each thread copies 16 bytes of a tile's lse")
        for field, head_dim in (("block_d", self.head_dim), ("block_dv", self.head_dim_v)):
            block = getattr(self, field)
            unit = max(64, least)
            require(
                block == round_up(head_dim, 16) or (0 < block < head_dim and block % unit == 0),
                field,
                f"{round_up(head_dim, 16)}, the head dimension in steps of 16, or a smaller multiple of {unit}",
            )
        require(self.num_stages in (1, 2), "num_stages", "1 or 2")
        widths = tuple(width for width in (2, 4, 8, 16) if width >= element_bytes)
        require(self.load_bytes in widths, "load_bytes", f"one of {widths}")
        require(self.store_bytes in widths, "store_bytes", f"one of {widths}")

    @property
    def entry(self) -> str:
        return f"cuflash_{self.family}_d{self.head_dim}_{self.head_dim_v}_{self.block_m}x{self.block_n}"


class PrepareConfig(BackwardConfig):
    """The same for the kernel before: delta and lse of each query, sums of dq set to zero."""

    family = "prepare"


class FinishConfig(BackwardConfig):
    """The same for the kernel after: dq from its sums."""

    family = "finish"


@dataclass(frozen=True)
class BiasGradientConfig(KernelConfig):
    """Compile-time constants of the kernel that computes the gradient of a bias, after the backward kernels.

    A block owns block_m rows and block_n columns of the gradient, or one where the bias has one, and visits every tile
    of scores that they are added to.
    """

    dtype: str  # q, k, v and the cotangent of out: as in ForwardConfig
    bias_dtype: str
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int
    row_block: int  # block_m of the backward kernels
    num_warps: int
    load_bytes: int
    windowed: bool
    softcapped: bool
    varlen: bool
    mask: str = ""  # as in ForwardConfig

    family = "bias_gradient"
    record = "BiasGradient"
    resident = 1

    def __post_init__(self) -> None:
        require = self.require
        require(self.dtype in ELEMENT_NAMES[1:], "dtype", f"one of {ELEMENT_NAMES[1:]}")
        require(self.bias_dtype in ARRAY_DTYPES, "bias_dtype", f"one of {ARRAY_DTYPES}")
        require(1 <= self.head_dim <= 512, "head_dim", "1 to 512")
        require(1 <= self.head_dim_v <= 512, "head_dim_v", "1 to 512")
        require(self.block_m in (16, 32, 64, 128), "block_m", "16, 32, 64 or 128")
        require(self.num_warps in (1, 2, 4, 8), "num_warps", "1, 2, 4 or 8")
        require(
            self.block_n > 0 and self.block_n % (16 * self.num_warps) == 0,
            "block_n",
            f"a multiple of 16 * num_warps = {16 * self.num_warps}",
        )
        require(self.row_block % self.block_m == 0, "row_block", f"a multiple of block_m = {self.block_m}")
        require(self.load_bytes in (2, 4, 8, 16), "load_bytes", "2, 4, 8 or 16")

    @property
    def entry(self) -> str:
        return f"cuflash_bias_gradient_d{self.head_dim}_{self.head_dim_v}_{self.block_m}x{self.block_n}"


@dataclass(frozen=True)
class TileRowsConfig(KernelConfig):
    """Compile-time constants of the kernel that finds the tiles a mask shows, by query tile."""

    block_m: int  # queries and
    block_n: int  # keys of a tile
    num_warps: int
    varlen: bool
    turns: bool  # of the backward pass: what the kernel that lists tiles by key tile reads, not lists
    mask: str
    paged: bool = False  # as in ForwardConfig

    family = "tile_rows"
    record = "TileList"
    resident = 1

    def __post_init__(self) -> None:
        for field in ("block_m", "block_n", "num_warps"):
            self.require(getattr(self, field) >= 1, field, ">= 1")

    @property
    def entry(self) -> str:
        return f"cuflash_{self.family}_{self.block_m}x{self.block_n}"


class TileColumnsConfig(TileRowsConfig):
    """The same for the kernel that lists them by key tile."""

    family = "tile_columns"


@dataclass(frozen=True)
class CombineConfig(KernelConfig):
    """Compile-time constants of the kernel that merges the partial attention states of splits."""

    state_dtype: str  # of the partial outputs
    out_dtype: str
    head_dim_v: int
    load_bytes: int  # widest access that every row of the states is aligned to
    row_warps: int  # that share the states of a row
    num_warps: int

    family = "combine"
    record = "Combine"
    resident = 1

    def __post_init__(self) -> None:
        for field in ("state_dtype", "out_dtype"):
            self.require(getattr(self, field) in ARRAY_DTYPES, field, f"one of {', '.join(ARRAY_DTYPES)}")
        self.require(self.head_dim_v >= 1, "head_dim_v", ">= 1")
        row_bytes = ELEMENT_BYTES[self.state_dtype] * self.head_dim_v
        widths = tuple(width for width in (2, 4, 8, 16) if row_bytes % width == 0)
        self.require(self.load_bytes in widths, "load_bytes", f"one of {widths}, which a row divides into")
        self.require(self.row_warps in (1, self.num_warps), "row_warps", f"1 or num_warps = {self.num_warps}")

    @property
    def entry(self) -> str:
        return f"cuflash_{self.family}_d{self.head_dim_v}"


class MergeConfig(CombineConfig):
    """The same for states that lie anywhere (`merge_states`)."""

    family = "merge"
    record = "Merge"
