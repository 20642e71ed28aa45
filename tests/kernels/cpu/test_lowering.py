"""The innermost loops keep their vectors in registers, on CPUs that need not be the one at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparselab.kernels.cpu.runtime.matrix_unit import has_matrix_unit
from tests.kernels.cpu.assembly import Loop, innermost_loops
from tests.kernels.cpu.lower import NARROW, UNIT_GRADIENT
from tests.kernels.process import run_python
from tests.shared import once, usual

NEOVERSE = "aarch64-unknown-linux-gnu:neoverse-n1"
APPLE = "arm64-apple-macosx:apple-m1"
HASWELL = "x86_64-unknown-linux-gnu:haswell"
SKYLAKE = "x86_64-unknown-linux-gnu:skylake-avx512"
SAPPHIRE_RAPIDS = "x86_64-unknown-linux-gnu:sapphirerapids"
ZEN4 = "x86_64-unknown-linux-gnu:znver4"

#: Any multiply-add, and one on whole vector registers, by the width that the kernels are compiled for.
ANY_FMA = r"\b(fmla[.\w]*|fmadd|vfmadd\w+)\s"
VECTOR_FMA = {
    16: r"\bfmla(\.(4s|2d)\s|\s+v\d+\.(4s|2d),)",
    32: r"\bvfmadd\w+p[sd]\s.*%ymm\d+$",
    64: r"\bvfmadd\w+p[sd]\s.*%zmm\d+$",
}

#: On vectors, of whole registers or not.
ANY_VECTOR_FMA = rf"{VECTOR_FMA[16]}|\bvfmadd\w+p[sd]\s"


#: Loops with multiply-adds: two rows, the rest of the longer, one row; whole groups of dots, the others; the
#: connections of one row; the tokens of eight connections; a wide and a narrow row of tokens of a strip; a
#: wide one; three columns of a strip; the columns of a block; its tokens, for two vectors and for one.
N_LOOPS = {
    "spmm": 3, "sddmm_dw": 2, "multiply_shifted": 1, "sample_shifted": 1,
    "block gather": 2, "block scatter": 1, "block gradient": 1,
    "block direct": 1, "block direct gradient": 2,
}  # fmt: skip
KERNELS = (*N_LOOPS, "block skinny")


#: What makes four numbers of four weights, by the dtype of the weights.
CONVERSION = {
    "int8": r"\b(vcvtdq2ps\s.*%xmm\d+$|scvtf(\.4s\s|\s+v\d+\.4s,))",
    "uint16": r"\b(vpslld\s.*%xmm\d+$|shll(\.4s\s|\s+v\d+\.4s,))",
}


class Listings:
    """Assembly of the kernels, compiled by one process for each CPU, vector width and dtype."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def types(self) -> Path:
        """The file of what the kernels are called with."""
        file = self.directory / "types"
        with once(file) as missing:
            if missing:
                run_python("-m", "tests.kernels.cpu.lower", "record", str(file))
        return file

    def loops(
        self, width: int, kernel: str, dtype: str, target: str, kernels: tuple[str, ...] = KERNELS,
        multiply: str = ANY_FMA,
    ) -> list[Loop]:  # fmt: skip
        """The innermost loops that multiply; `kernels` are compiled together."""
        types = self.types()
        directory = self.directory / f"{target.split(':')[1]}-{width}-{dtype}"
        with once(directory) as missing:
            if missing:
                directory.mkdir(exist_ok=True)
                run_python(
                    "-m", "tests.kernels.cpu.lower", "compile", str(types), str(directory), target, dtype,
                    *kernels, SPARSELAB_VECTOR_BYTES=str(width),
                )  # fmt: skip
        listing = (directory / f"{kernel}-{dtype}.s").read_text()
        return [loop for loop in innermost_loops(listing) if loop.count(multiply)]


@pytest.fixture(scope="session")
def listings(shared_directory: Path) -> Listings:
    directory = shared_directory / "listings"
    directory.mkdir(exist_ok=True)
    return Listings(directory)


every_target = pytest.mark.parametrize(
    ("width", "target"),
    [(16, NEOVERSE), usual(False, 16, APPLE), (32, HASWELL), (64, SKYLAKE), usual(False, 64, ZEN4)],
    ids=["neoverse-n1", "apple-m1", "haswell", "skylake-avx512", "znver4"],
)
every_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])


@every_dtype
@every_target
def test_innermost_loops_work_on_vector_registers(
    listings: Listings, width: int, target: str, dtype: str
) -> None:
    """All kernels in one test: they are compiled together, and another process would wait for that."""
    for kernel, n_loops in N_LOOPS.items():
        loops = listings.loops(width, kernel, dtype, target)
        if (width, kernel) == (32, "block direct"):
            assert any(loop.spills for loop in loops)  # which is why it serves no layer there
            continue
        assert len(loops) >= n_loops, kernel
        for loop in loops:
            assert loop.count(ANY_FMA) == loop.count(VECTOR_FMA[width]) >= 2, kernel
            assert not loop.count(r"^\s+(call|bl)"), kernel
            assert not loop.spills, kernel
    loops = listings.loops(width, "block skinny", dtype, target)
    # Columns: four rows, one. Tokens in two sizes: four rows of one column, of several; four blocks of a row,
    # the rest of them.
    assert len(loops) >= 2 + 2 * 4
    for loop in loops:
        assert loop.count(ANY_FMA) == loop.count(ANY_VECTOR_FMA) >= 1
        assert not loop.count(r"^\s+(call|bl)")
        assert not loop.spills


@pytest.mark.parametrize("dtype", [usual(dtype == "int8", dtype) for dtype in NARROW])
@pytest.mark.parametrize(
    ("width", "target"),
    [
        (16, NEOVERSE),
        usual(False, 16, APPLE),
        usual(False, 32, HASWELL),
        (64, SKYLAKE),
        usual(False, 64, ZEN4),
    ],
)
def test_few_tokens_of_narrow_weights_are_converted_in_vectors(
    listings: Listings, width: int, target: str, dtype: str
) -> None:
    names = "skinny", "block skinny"
    for kernel in names:
        loops = listings.loops(width, kernel, dtype, target, kernels=names)
        # Not those over rows, which multiply by a scale.
        inner = [loop for loop in loops if loop.count(ANY_VECTOR_FMA)]
        assert inner
        for loop in inner:
            assert not loop.count(r"^\s+(call|bl)")
            assert not loop.spills
    # Four connections are converted by one operation, for two sizes of vectors of tokens.
    four = [
        loop
        for loop in listings.loops(width, "skinny", dtype, target, kernels=names)
        if loop.count(CONVERSION[dtype]) == 1 and loop.count(ANY_FMA) in (4, 8, 16)
    ]
    assert len(four) >= 2
    for loop in four:
        assert loop.count(ANY_FMA) == loop.count(ANY_VECTOR_FMA)


@pytest.mark.skipif(not has_matrix_unit(), reason="what to compile for is seen by a call")
def test_a_step_of_the_matrix_unit_loads_each_tile_once(listings: Listings) -> None:
    names = (UNIT_GRADIENT,)
    product = r"^\s+tdpbf16ps\s"
    loops = listings.loops(64, *names, "uint16", SAPPHIRE_RAPIDS, kernels=names, multiply=product)
    assert loops
    for loop in loops:
        assert loop.count(product) == loop.count(r"^\s+tileloadd\s")
        assert loop.count(product) % 4 == 0  # unrolled or not
        assert not loop.count(r"^\s+(call|tilestored)\b")
        assert not loop.spills


@pytest.mark.parametrize(
    "target", [NEOVERSE, usual(False, APPLE), HASWELL], ids=["neoverse-n1", "apple-m1", "haswell"]
)
def test_a_tile_row_too_wide_for_the_cpu_is_seen_to_spill(listings: Listings, target: str) -> None:
    for kernel in ("spmm", "sddmm_dw"):
        loops = listings.loops(64, kernel, "float32", target, kernels=("spmm", "sddmm_dw"))
        assert any(loop.spills for loop in loops)


X86 = """\
outer:
\tvmovups\t%ymm1, 32(%rsp) # 32-byte Spill
.LBB0_1:
\tvfmadd231ps\t(%rax), %ymm0, %ymm1
{inner}
\tjne\t.LBB0_1
\tjmp\touter
.Lend:
\tretq
"""
ARM = """\
LBB0_1:
\tfmla\tv0.4s, v1.4s, v2.s[0]
{inner}
\tcbnz\tx3, LBB0_1
\tb.ne\tLBB0_2
LBB0_2:
\tret
"""


@pytest.mark.parametrize(
    ("listing", "inner", "spills"),
    [
        (X86, "\tdecq\t%rcx", False),
        (X86, "\tmovq\t480(%rsp), %r10", False),
        (X86, "\tvaddps\t64(%rsp), %ymm0, %ymm0", True),
        (X86, "\tvmovups\t%zmm1, (%rbp) # 64-byte Spill", True),
        (X86, "\tvmovups\t(%rbp), %xmm1 # 16-byte Folded Reload", True),
        (ARM, "\tsub\tx3, x3, #1", False),
        (ARM, "\tldr\tx20, [sp, #16]", False),
        (ARM, "\tldr\tq20, [sp, #272] // 16-byte Reload", True),
        (ARM, "\tstp\tq1, q0, [sp, #224] ; 32-byte Folded Spill", True),
    ],
)
def test_the_reader_of_assembly_finds_the_inner_loop_and_its_spills(
    listing: str, inner: str, spills: bool
) -> None:
    (loop,) = innermost_loops(listing.format(inner=inner))
    assert len(loop.lines) == 4
    assert loop.count(ANY_FMA) == 1
    assert bool(loop.spills) is spills


@pytest.mark.parametrize(("target", "loops"), [(".Lend", 0), (".LB", 1)])
def test_a_branch_back_to_a_block_that_leaves_is_no_loop(target: str, loops: int) -> None:
    listing = f".LA:\n\tnop\n\tjmp\t{target}\n.LB:\n\tnop\n\tje\t.LA\n.Lend:\n\tretq\n"
    assert len(list(innermost_loops(listing))) == loops


def test_comments_and_scalars_are_not_counted_as_vector_work() -> None:
    loop = Loop(
        ["\tfmadd\ts0, s1, s2, s3", "\tnop // fmla v0.4s, v1.4s", "\tvfmadd231ss\t%xmm1, %xmm2, %xmm3"]
    )
    assert loop.count(ANY_FMA) == 2
    assert not any(loop.count(pattern) for pattern in VECTOR_FMA.values())


def test_a_comment_after_a_vector_instruction_hides_nothing() -> None:
    loop = Loop(["\tvfmadd231ps\t%ymm1, %ymm2, %ymm3   # ymm3 = (ymm2 * ymm1) + ymm3"])
    assert loop.count(ANY_FMA) == loop.count(VECTOR_FMA[32]) == 1
