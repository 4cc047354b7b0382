# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (an instruction, or a row of a table, is one line)
"""wgmma, tcgen05, TMA and clusters against products and layouts worked out here.

Operands are small integers, so that every product and sum is exact; shared memory gets its image from
the host, laid out as the PTX ISA's figures say.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from emulator import tensor_map
from emulator.errors import (
    EmulatorError,
    Misaligned,
    OutOfBounds,
    Poison,
    ProtocolError,
    RaceError,
)
from emulator.harness import program_of, run_body
from emulator.launch import Configuration, Launch, Options
from emulator.memory import GlobalMemory
from emulator.schedule import Schedule

SCHEDULES = ("eager", "late", "random:1", "pct:2")
A_AT, B_AT = 1024, 1024 + 16384
SHARED = 64 * 1024
BYTES = {"128": 128, "64": 64, "32": 32}
XOR = {"128": 7, "64": 3, "32": 1}


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def bits16(x: np.ndarray, kind: str = "bf16") -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16 if kind == "bf16" else np.float16).view(np.uint16)


def image(
    matrix: np.ndarray, layout: str, mn_major: bool, kind: str = "bf16"
) -> tuple[np.ndarray, int, int]:
    """(bytes, leading offset, stride offset) of an operand [rows, 16] in shared memory."""
    rows, depth = matrix.shape
    raw = np.zeros(16384, np.uint8)
    elements = raw.view(np.uint16)
    values = bits16(matrix, kind)
    if layout == "none":
        # Core matrices of 8 rows of 16 bytes; K-major: 8 rows of M, MN-major: 8 rows of K.
        leading, stride = (128, 256) if not mn_major else (2048, 128)
    else:
        width = BYTES[layout]
        leading, stride = (0, 8 * width) if not mn_major else (4096, 8 * width)
    for i in range(rows):
        for k in range(depth):
            if layout == "none" and not mn_major:
                at = i // 8 * stride + k // 8 * leading + i % 8 * 16 + k % 8 * 2
            elif layout == "none":
                at = i // 8 * stride + k // 8 * leading + k % 8 * 16 + i % 8 * 2
            else:
                per_row = width // 2
                if mn_major:
                    at = i // per_row * leading + k // 8 * stride + k % 8 * width + i % per_row * 2
                else:
                    at = i // 8 * stride + i % 8 * width + k * 2
                at ^= (at >> 7 & XOR[layout]) << 4
            elements[at // 2] = values[i, k]
    return raw, leading, stride


LOAD_IMAGES = f"""
    setp.ne.u32 %p1, %tid, 0; @%p1 bra LOADED;
    mbarrier.init.shared.b64 [%smem], 1; mbarrier.init.shared.b64 [%smem+8], 1;
    fence.mbarrier_init.release.cluster;
    mov.b32 %r1, 32768; mbarrier.arrive.expect_tx.shared.b64 _, [%smem], %r1;
    add.s32 %r2, %smem, {A_AT}; mov.b32 %r1, 16384;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%in0], %r1, [%smem];
    add.s32 %r2, %smem, {B_AT};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%in1], %r1, [%smem];
LOADED:
    bar.sync 0;
"""


def wait(offset: int, parity: int = 0, tag: str = "A") -> str:
    return f"""
    {{ .reg .pred done;
W{tag}: mbarrier.try_wait.parity.shared.b64 done, [%smem+{offset}], {parity}; @done bra D{tag}; bra W{tag};
D{tag}: }}"""


def descriptor(register: str, at: int, fields: int) -> str:
    """Build a descriptor for the operand `at` bytes into shared memory."""
    return f"""
    add.s32 %r3, %smem, {at}; and.b32 %r3, %r3, 0x3FFFF; shr.u32 %r3, %r3, 4;
    cvt.u64.u32 {register}, %r3; or.b64 {register}, {register}, {fields};"""


def wgmma_fields(layout: str, leading: int, stride: int) -> int:
    code = {"none": 0, "128": 1, "64": 2, "32": 3}[layout]
    return leading >> 4 << 16 | stride >> 4 << 32 | code << 62


def accumulators(columns: int) -> str:
    return "{" + ", ".join(f"%f{i}" for i in range(columns // 2)) + "}"


def store_accumulators(columns: int) -> str:
    """Thread t's registers go to row t of the output, which is an input of the harness, %in2."""
    text = f"mul.wide.u32 %d9, %tid, {2 * columns}; add.s64 %d9, %in2, %d9;"
    return text + "".join(f"st.global.b32 [%d9+{4 * i}], %f{i};" for i in range(columns // 2))


def gathered(registers: np.ndarray, columns: int) -> np.ndarray:
    """[128 threads, columns / 2] to D [64, columns]: PTX ISA, the figure of wgmma's D fragment."""
    result = np.full((64, columns), np.nan, np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(columns // 2):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            result[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = registers[thread, i]
    return result


def run_wgmma(
    layouts: tuple[str, str], majors: tuple[int, int], columns: int, kind: str = "bf16", **options
) -> tuple[np.ndarray, np.ndarray]:
    """(D, A B^T)."""
    a, b = integers(64, 16), integers(columns, 16, seed=1)
    a_image, *a_offsets = image(a, layouts[0], bool(majors[0]), kind)
    b_image, *b_offsets = image(b, layouts[1], bool(majors[1]), kind)
    body = LOAD_IMAGES + wait(0)
    body += descriptor("%d1", A_AT, wgmma_fields(layouts[0], *a_offsets))
    body += descriptor("%d2", B_AT, wgmma_fields(layouts[1], *b_offsets))
    body += f"""
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {accumulators(columns)}, %d1, %d2, 0,
        1, 1, {majors[0]}, {majors[1]};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    """
    out = np.full((128, columns // 2), np.nan, np.float32)
    inputs = (a_image, b_image, out)
    body += store_accumulators(columns)
    run_body(body, inputs, np.zeros(128, np.uint64), block=128, shared=SHARED, **options)
    return gathered(out, columns), a @ b.T


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("columns", [8, 64, 128])
@pytest.mark.parametrize("layout", ["128", "64", "32", "none"])
def test_wgmma_k_major(layout: str, columns: int, kind: str) -> None:
    got, expected = run_wgmma((layout, layout), (0, 0), columns, kind, check=True)
    assert (got == expected).all()


@pytest.mark.parametrize("majors", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("layout", ["128", "64", "32", "none"])
def test_wgmma_mn_major(layout: str, majors: tuple[int, int]) -> None:
    got, expected = run_wgmma((layout, layout), majors, 64, check=True)
    assert (got == expected).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wgmma_in_every_schedule(schedule: str) -> None:
    got, expected = run_wgmma(
        ("128", "64"), (0, 1), 64, schedule=Schedule.parse(schedule), check=True
    )
    assert (got == expected).all()


WGMMA_TWICE = """
    {fence}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {acc}, {a}, %d2, {first}, {signs}, 0{a_major};
    {between}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {acc}, {a}, %d2, 1, {signs}, 0{a_major};
    wgmma.commit_group.sync.aligned;
    {wait}
    {after}
"""


def run_twice(registers: bool = False, **changes) -> tuple[np.ndarray, np.ndarray]:
    """Two wgmmas into the same accumulators; (D, A B^T)."""
    options = {
        "fence": "wgmma.fence.sync.aligned;",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "signs": "1, 1",
        "first": "0",
        "between": "",
        "after": "",
        "acc": accumulators(8),
        "a": "{%r10, %r11, %r12, %r13}" if registers else "%d1",
        "a_major": "" if registers else ", 0",
    }
    launch = {key: changes.pop(key) for key in ("schedule", "check") if key in changes}
    start = changes.pop("start", A_AT)
    options |= changes
    a, b = integers(64, 16), integers(8, 16, seed=1)
    a_image, *a_offsets = image(a, "128", False)
    b_image, *b_offsets = image(b, "128", False)
    body = LOAD_IMAGES + wait(0)
    body += descriptor("%d1", start, wgmma_fields("128", *a_offsets))
    body += descriptor("%d2", B_AT, wgmma_fields("128", *b_offsets))
    if registers:
        # PTX ISA, A fragment: register i has rows lane / 4 + 8 (i % 2), columns 2 (lane % 4) + 8 (i / 2).
        fragments = np.zeros((128, 4), np.uint32)
        values = bits16(a).astype(np.uint32)
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            for i in range(4):
                row, column = 16 * warp + lane // 4 + 8 * (i % 2), lane % 4 * 2 + 8 * (i // 2)
                fragments[thread, i] = values[row, column] | values[row, column + 1] << 16
        a_image[: fragments.nbytes] = fragments.view(np.uint8).ravel()
        body += "mul.wide.u32 %d5, %tid, 16; add.s64 %d5, %in0, %d5;"
        body += "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5];"
    body += WGMMA_TWICE.format(**options) + store_accumulators(8)
    out = np.full((128, 4), np.nan, np.float32)
    run_body(
        body, (a_image, b_image, out), np.zeros(128, np.uint64), block=128, shared=SHARED, **launch
    )
    return gathered(out, 8), a @ b.T


@pytest.mark.parametrize("registers", [False, True])
def test_wgmma_accumulates(registers: bool) -> None:
    got, expected = run_twice(registers, check=True)
    assert (got == 2 * expected).all()


@pytest.mark.parametrize("signs, factor", [("-1, 1", -1), ("1, -1", -1), ("-1, -1", 1)])
def test_wgmma_negates(signs: str, factor: int) -> None:
    got, expected = run_twice(signs=signs)
    assert (got == 2 * factor * expected).all()


def test_wgmma_needs_its_fence() -> None:
    with pytest.raises(RaceError, match="without wgmma.fence"):
        run_twice(fence="", check=True)
    with pytest.raises(
        RaceError, match="uses register %f0, which was modified after the last wgmma.fence"
    ):
        run_twice(between="mov.b32 %f0, 0f3F800000;", check=True)


def test_wgmma_registers_hold_nothing_before_the_wait() -> None:
    late = {"schedule": Schedule.parse("late")}
    use = "wgmma.wait_group.sync.aligned 1; mov.b32 %r20, %f0;"
    got, expected = run_twice(
        wait=use, after="wgmma.wait_group.sync.aligned 0; mov.b32 %f0, %r20;", **late
    )
    assert not (got == 2 * expected).all()
    got, _ = run_twice(True, wait="mov.b32 %r10, 0; wgmma.wait_group.sync.aligned 0;", **late)
    assert not (got == 2 * expected).all()


def test_wgmma_without_a_wait() -> None:
    with pytest.raises(ProtocolError, match="wgmma that it didn't wait for"):
        run_twice(wait="")


def test_operands_reused_before_the_wait() -> None:
    with pytest.raises(
        RaceError, match="write by warp .* is not ordered after the read by wgmma of warp"
    ):
        run_twice(
            wait=f"st.shared.b32 [%smem+{B_AT}], %tid; wgmma.wait_group.sync.aligned 0;", check=True
        )


@pytest.mark.parametrize("offset", [128, 512])
def test_misaligned_descriptor(offset: int) -> None:
    with pytest.raises(Misaligned, match="matrix descriptor: start .* 128-byte swizzle"):
        run_twice(start=A_AT + offset)


def test_descriptor_outside_shared_memory() -> None:
    with pytest.raises(OutOfBounds, match="matrix operand"):
        run_twice(start=SHARED - 1024)


def test_wgmma_on_unwritten_memory() -> None:
    with pytest.raises(Poison, match="wgmma of warp . .* reads shared memory"):
        run_twice(start=B_AT + 16384, check=True)


def test_partial_warps_may_not_execute_aligned_instructions() -> None:
    body = "setp.lt.u32 %p1, %tid, 5; @%p1 bra OUT; wgmma.fence.sync.aligned; OUT:"
    with pytest.raises(ProtocolError, match="27 of 32 lanes"):
        run_body(body, (), np.zeros(32, np.uint64))


# tcgen05 ------------------------------------------------------------------------------------------

ALLOCATE = """
    setp.ne.u32 %p2, %warp, 0; @%p2 bra ALLOCATED;
    add.s32 %r5, %smem, 16;
    tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r5], {columns};
    tcgen05.relinquish_alloc_permit.cta_group::{group}.sync.aligned;
ALLOCATED:
    bar.sync 0;
    ld.shared.b32 %r6, [%smem+16];
"""
FREE = """
    bar.sync 0;
    @%p2 bra FREED;
    tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r6, {columns};
FREED:
"""
READ = """
    shl.b32 %r7, %warp, 21; add.s32 %r7, %r7, %r6;
    tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{registers}}}, [%r7+{column}];
    {wait}
    mul.wide.u32 %d9, %tid, {row}; add.s64 %d9, %in2, %d9;
    {stores}
"""


def read_tensor(
    columns: int, column: int = 0, wait_ld: str = "tcgen05.wait::ld.sync.aligned;"
) -> str:
    """Thread t stores its lane's columns to row t of %in2."""
    return READ.format(
        n=columns,
        registers=", ".join(f"%f{i}" for i in range(columns)),
        column=column,
        wait=wait_ld,
        row=4 * columns,
        stores="".join(f"st.global.b32 [%d9+{4 * i}], %f{i};" for i in range(columns)),
    )


def tcgen05_fields(layout: str, leading: int, stride: int) -> int:
    code = {"none": 0, "128": 2, "64": 4, "32": 6}[layout]
    return leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | code << 61


def idesc(rows: int, columns: int, majors: tuple[int, int] = (0, 0), kind: int = 1) -> int:
    """PTX ISA, instruction descriptor of kind::f16 with float32 accumulators; kind 1 is bf16."""
    types = 1 << 4 | kind << 7 | kind << 10
    return types | majors[0] << 15 | majors[1] << 16 | columns >> 3 << 17 | rows >> 4 << 24


def issue(
    group: int, rows: int, columns: int, *, a: str = "%d1", accumulate: int = 0, majors=(0, 0)
) -> str:
    return f"""
    mov.b32 %r8, {idesc(rows, columns, majors)}; setp.ne.u32 %p5, {accumulate}, 0;
    tcgen05.mma.cta_group::{group}.kind::f16 [%r6], {a}, %d2, %r8, %p5;""".replace(
        f"setp.ne.u32 %p5, {accumulate}, 0;", f"mov.b32 %r9, {accumulate}; setp.ne.u32 %p5, %r9, 0;"
    )


def run_tcgen05(
    columns: int = 32,
    layouts: tuple[str, str] = ("128", "128"),
    majors: tuple[int, int] = (0, 0),
    *,
    mma: str | None = None,
    before: str = "",
    after: str = "",
    free: str | None = None,
    read: str | None = None,
    **options,
) -> tuple[np.ndarray, np.ndarray]:
    """One CTA's M = 128: (D, A B^T)."""
    a, b = integers(128, 16), integers(columns, 16, seed=1)
    a_image, *a_offsets = image(a, layouts[0], bool(majors[0]))
    b_image, *b_offsets = image(b, layouts[1], bool(majors[1]))
    body = LOAD_IMAGES + ALLOCATE.format(group=1, columns=64) + wait(0)
    body += descriptor("%d1", A_AT, tcgen05_fields(layouts[0], *a_offsets))
    body += descriptor("%d2", B_AT, tcgen05_fields(layouts[1], *b_offsets))
    body += before + "@%p1 bra ISSUED;"
    body += issue(1, 128, columns, majors=majors) if mma is None else mma
    body += """
    add.s32 %r4, %smem, 8; tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
ISSUED:""" + wait(8, tag="B")
    body += read_tensor(columns) if read is None else read
    body += after + (FREE.format(group=1, columns=64) if free is None else free)
    out = np.full((128, columns), np.nan, np.float32)
    run_body(
        body, (a_image, b_image, out), np.zeros(128, np.uint64), block=128, shared=SHARED, **options
    )
    return out, a @ b.T


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_tcgen05(columns: int, schedule: str) -> None:
    got, expected = run_tcgen05(columns, schedule=Schedule.parse(schedule), check=True)
    assert (got == expected).all()


@pytest.mark.parametrize("majors", [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("layout", ["128", "64", "32", "none"])
def test_tcgen05_layouts(layout: str, majors: tuple[int, int]) -> None:
    if layout == "32" and majors[0]:
        pytest.skip("128 rows of a 32-byte pattern do not fit the image")
    got, expected = run_tcgen05(32, (layout, layout), majors, check=True)
    assert (got == expected).all()


def test_tcgen05_accumulates() -> None:
    twice = issue(1, 128, 32) + issue(1, 128, 32, accumulate=1)
    got, expected = run_tcgen05(mma=twice, check=True)
    assert (got == 2 * expected).all()


def test_tcgen05_skips_disabled_lanes() -> None:
    """A lane of the mask keeps what it had: here the first product, elsewhere the second is added."""
    masked = issue(1, 128, 32, accumulate=1).replace(
        "%r8, %p5;", "%r8, {%r20, %r21, %r21, %r21}, %p5;"
    )
    twice = "mov.b32 %r20, 0x0000FFFF; mov.b32 %r21, 0;" + issue(1, 128, 32) + masked
    got, expected = run_tcgen05(mma=twice)
    assert (got == expected * np.where(np.arange(128) < 16, 1, 2)[:, None]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tcgen05_with_a_in_tensor_memory(schedule: str) -> None:
    a = integers(128, 16)
    words = bits16(a).reshape(128, 8, 2).astype(np.uint32)
    packed = np.ascontiguousarray(words[..., 0] | words[..., 1] << 16)
    a_image = np.zeros(16384, np.uint8)
    a_image[: packed.nbytes] = packed.view(np.uint8).ravel()
    b = integers(32, 16, seed=1)
    b_image, *offsets = image(b, "128", False)
    registers = ", ".join(f"%r{30 + i}" for i in range(8))
    body = LOAD_IMAGES + ALLOCATE.format(group=1, columns=64) + wait(0)
    body += descriptor("%d2", B_AT, tcgen05_fields("128", *offsets))
    body += "mul.wide.u32 %d5, %tid, 32; add.s64 %d5, %in0, %d5;"
    body += "ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%d5];"
    body += "ld.global.v4.b32 {%r34, %r35, %r36, %r37}, [%d5+16];"
    body += "shl.b32 %r7, %warp, 21; add.s32 %r7, %r7, %r6;"
    body += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r7+32], {{{registers}}};"
    body += "tcgen05.wait::st.sync.aligned; bar.sync 0; @%p1 bra ISSUED;"
    body += issue(1, 128, 32, a="[%r6+32]")
    body += (
        """
    add.s32 %r4, %smem, 8; tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
ISSUED:"""
        + wait(8, tag="B")
        + read_tensor(32)
        + FREE.format(group=1, columns=64)
    )
    out = np.full((128, 32), np.nan, np.float32)
    arguments = (body, (a_image, b_image, out), np.zeros(128, np.uint64))
    options = {"block": 128, "shared": SHARED, "schedule": Schedule.parse(schedule), "check": True}
    run_body(*arguments, **options)
    assert (out == a @ b.T).all()
    without = body.replace("tcgen05.wait::st.sync.aligned;", "")
    with pytest.raises(
        RaceError, match="read by tensor pipe .* not ordered after the write by tcgen05.st"
    ):
        run_body(without, *arguments[1:], **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [128, 256])
def test_tcgen05_of_two_ctas(rows: int, schedule: str) -> None:
    """cta_group::2: each CTA holds half of A's rows and half of B's, and gets half of D's rows; with
    M = 128 lanes 64 to 127 hold the upper half of the columns."""
    columns = 64
    a, b = integers(rows, 16), integers(columns, 16, seed=1)
    images = [image(part, "128", False)[0] for part in np.split(a, 2)]
    images += [image(part, "128", False)[0] for part in np.split(b, 2)]
    a_images, b_images = np.concatenate(images[:2]), np.concatenate(images[2:])
    width = columns // 2 if rows == 128 else columns
    fields = tcgen05_fields("128", 0, 1024)
    body = "mov.u32 %r60, %cluster_ctarank; mul.wide.u32 %d10, %r60, 16384;"
    body += "add.s64 %in0, %in0, %d10; add.s64 %in1, %in1, %d10;"
    body += LOAD_IMAGES + ALLOCATE.format(group=2, columns=64)
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" + wait(0)
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    body += descriptor("%d1", A_AT, fields) + descriptor("%d2", B_AT, fields)
    body += "setp.ne.u32 %p6, %r60, 0; or.pred %p6, %p6, %p1; @%p6 bra ISSUED;" + issue(
        2, rows, columns
    )
    body += """
    add.s32 %r4, %smem, 8; mov.b16 %h1, 3;
    tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r4], %h1;
ISSUED:""" + wait(8, tag="B")
    body += f"mul.wide.u32 %d10, %r60, {128 * width * 4}; add.s64 %in2, %in2, %d10;" + read_tensor(
        width
    )
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    body += FREE.format(group=2, columns=64)
    out = np.full((2, 128, width), np.nan, np.float32)
    run_body(body, (a_images, b_images, out), np.zeros(256, np.uint64), block=128, grid=2, cluster=2,
             shared=SHARED, schedule=Schedule.parse(schedule), check=True)  # fmt: skip
    expected = (a @ b.T).reshape(2, rows // 2, columns)
    if rows == 128:
        expected = np.concatenate([expected[:, :, :32], expected[:, :, 32:]], 1)
    assert (out == expected).all()


def test_missing_wait_ld() -> None:
    """Without it nothing orders the load before what overwrites the columns."""
    store = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {%r60}; tcgen05.wait::st.sync.aligned;"
    with pytest.raises(RaceError, match="not ordered after the read by tcgen05.ld of warp"):
        run_tcgen05(read=read_tensor(32, wait_ld=""), after="mov.b32 %r60, 0;" + store, check=True)


def test_tensor_memory_leak() -> None:
    with pytest.raises(ProtocolError, match=r"exits with tensor memory \{0: 64\}"):
        run_tcgen05(free="")


def test_tensor_memory_that_is_not_allocated() -> None:
    with pytest.raises(OutOfBounds, match=r"columns \[64, 96\): allocated are \[\(0, 64\)\]"):
        run_tcgen05(read=read_tensor(32, column=64))


def test_unwritten_tensor_memory() -> None:
    with pytest.raises(
        Poison, match="reads tensor memory lanes 0-31 column 32, which nothing wrote"
    ):
        run_tcgen05(read=read_tensor(32, column=32), check=True)


def test_wrong_deallocation() -> None:
    with pytest.raises(ProtocolError, match="tcgen05.dealloc of 32 columns at 0: allocated are"):
        run_tcgen05(free=FREE.format(group=1, columns=32))


def test_allocation_after_relinquishing() -> None:
    again = (
        "@%p2 bra SKIP; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r5], 32; SKIP:"
    )
    with pytest.raises(ProtocolError, match="after tcgen05.relinquish_alloc_permit"):
        run_tcgen05(before=again)


def test_lanes_of_another_warp() -> None:
    with pytest.raises(ProtocolError, match="which reaches lanes 32 to 63"):
        run_tcgen05(read=read_tensor(32).replace("shl.b32 %r7, %warp, 21;", "mov.b32 %r7, 0;"))


def test_result_read_before_the_commit_has_arrived() -> None:
    body = read_tensor(32)
    with pytest.raises((RaceError, Poison)):
        run_tcgen05(
            read=body, check=True, mma=issue(1, 128, 32), before=body.replace("%d9", "%d11")
        )


# TMA ----------------------------------------------------------------------------------------------


def run_tma(body: str, tensor: np.ndarray, **fields) -> np.ndarray:
    """A kernel with a tensor map of `tensor` (the last dimension is dimension 0) as its first
    parameter, and 4 KiB of output; warp 0 runs `body` with %map, and %r1 = shared memory + 1024."""
    item = tensor.itemsize
    sizes = tuple(reversed(tensor.shape))
    strides = (item, *(int(np.prod(sizes[:i])) * item for i in range(1, len(sizes))))
    kind = {2: tensor_map.BFLOAT16, 4: tensor_map.FLOAT32}[item]
    options = {"swizzle": 0, "box": (8, 8), **fields}
    descriptor_ = tensor_map.TensorMap(
        tensor.ctypes.data, kind, options["swizzle"], sizes, strides, options["box"]
    )
    encoded = np.zeros(192, np.uint8)
    start = -encoded.ctypes.data % 64
    encoded[start : start + 128] = np.frombuffer(tensor_map.encode(descriptor_), np.uint8)
    assert tensor_map.decode(encoded[start:].tobytes()) == descriptor_
    out = np.full(4096, 0xEE, np.uint8)
    text = f"""
    add.s64 %d1, %in0, 0; add.s32 %r1, %smem, 1024;
    setp.ne.u32 %p1, %tid, 0; @%p1 bra GO;
    mbarrier.init.shared.b64 [%smem], 1; fence.mbarrier_init.release.cluster;
GO: bar.sync 0;
    {body}
    """
    program = program_of(text, 1)
    memory = GlobalMemory()
    base = encoded.ctypes.data + start
    memory.register(base, 128, "map")
    memory.register(tensor.ctypes.data, tensor.nbytes, "tensor")
    memory.register(out.ctypes.data, out.nbytes, "out")
    raw = np.array([base, out.ctypes.data], np.uint64).tobytes()
    configuration = Configuration((1, 1, 1), (32, 1, 1), (1, 1, 1), 16384)
    schedule = Schedule.parse(options.get("schedule", "eager"))
    Launch(program, configuration, raw, memory, Options(schedule, check=True)).run()
    return out


def tma_load(coordinates: str, box_bytes: int, rank: int = 2) -> str:
    return f"""
    @%p1 bra ISSUED; mov.b32 %r2, {box_bytes};
    mbarrier.arrive.expect_tx.shared.b64 _, [%smem], %r2;
    cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes
        [%r1], [%d1, {{{coordinates}}}], [%smem];
ISSUED:""" + wait(0)


def dump(count: int) -> str:
    """Lane l copies shared bytes [8 l, 8 l + 8) and every 256 bytes further to the output."""
    loads = "mad.lo.s32 %r3, %tid, 8, %r1;"
    for i in range(count // 256):
        loads += f"ld.shared.b64 %d2, [%r3+{256 * i}]; st.global.b64 [%out+{256 * i}], %d2;"
    return loads


@pytest.mark.parametrize("swizzle, box", [(0, (8, 16)), (1, (16, 16)), (2, (32, 8)), (3, (64, 8))])
@pytest.mark.parametrize("x, y", [(0, 0), (-3, 2), (60, 61), (0, -4), (200, 0)])
def test_tma_load(swizzle: int, box: tuple[int, int], x: int, y: int) -> None:
    """Inside the tensor its values, outside 0; 16-byte chunks xored with the row of 128 bytes."""
    tensor = np.arange(1, 64 * 64 + 1, dtype=np.uint16).reshape(64, 64)
    size = 2 * box[0] * box[1]
    coordinates = f"{x & 0xFFFFFFFF}, {y & 0xFFFFFFFF}"
    out = run_tma(
        tma_load(coordinates, size) + dump(max(size, 256)), tensor, swizzle=swizzle, box=box
    )
    expected = np.zeros(size // 2, np.uint16)
    for j in range(box[1]):
        for i in range(box[0]):
            at = 2 * (j * box[0] + i)
            if swizzle:
                at ^= (at >> 7 & {1: 1, 2: 3, 3: 7}[swizzle]) << 4
            if 0 <= x + i < 64 and 0 <= y + j < 64:
                expected[at // 2] = tensor[y + j, x + i]
    assert (out[:size].view(np.uint16) == expected).all()


def test_tma_load_of_rank_4() -> None:
    tensor = np.arange(2 * 3 * 16 * 8, dtype=np.uint16).reshape(2, 3, 16, 8)
    out = run_tma(tma_load("0, 4, 2, 1", 256, 4) + dump(256), tensor, box=(8, 16, 1, 1))
    expected = np.zeros((16, 8), np.uint16)
    expected[:12] = tensor[1, 2, 4:]
    assert (out[:256].view(np.uint16).reshape(16, 8) == expected).all()


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("schedule", ["eager", "late", "random:4"])
def test_tma_store_clips(reduce: bool, schedule: str) -> None:
    tensor = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
    before = tensor.copy()
    opcode = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add" if reduce else (
        "cp.async.bulk.tensor.2d.global.shared::cta")  # fmt: skip
    body = f"""
    mad.lo.s32 %r3, %tid, 8, %r1; cvt.rn.f32.u32 %r4, %tid; st.shared.v2.b32 [%r3], {{%r4, %r4}};
    fence.proxy.async.shared::cta; bar.sync 0;
    @%p1 bra OUT;
    {opcode}.tile.bulk_group [%d1, {{12, 10}}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
OUT:"""
    run_tma(body, tensor, box=(8, 8), schedule=schedule)
    expected = before.copy()
    for j in range(6):
        for i in range(4):
            value = (j * 8 + i) // 2
            expected[10 + j, 12 + i] = value + (before[10 + j, 12 + i] if reduce else 0)
    assert (tensor == expected).all()


def test_tma_at_a_misaligned_address() -> None:
    body = "add.s32 %r1, %r1, 16;" + tma_load("0, 0", 256)
    with pytest.raises(
        Misaligned, match="TMA: shared memory address 0x810 is not a multiple of 128"
    ):
        run_tma(body, np.zeros((64, 64), np.uint16), box=(8, 16))


def test_tma_row_longer_than_its_swizzle() -> None:
    with pytest.raises(ProtocolError, match="a row of 256 bytes with a 128-byte swizzle"):
        run_tma(tma_load("0, 0", 2048), np.zeros((64, 128), np.uint16), box=(128, 8), swizzle=3)


def test_not_a_tensor_map() -> None:
    with pytest.raises((ProtocolError, NotImplementedError, EmulatorError)):
        run_tma(tma_load("0, 0", 256).replace("%d1,", "%d3,") + "", np.zeros((8, 8), np.uint16))


# Clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copy_to_the_other_cta(schedule: str) -> None:
    """DSMEM: each CTA sends 128 bytes to the other and waits for its own mbarrier."""
    body = (
        """
    mov.u32 %r60, %cluster_ctarank; xor.b32 %r61, %r60, 1;
    setp.ne.u32 %p1, %tid, 0; @%p1 bra READY;
    mbarrier.init.shared.b64 [%smem], 1; fence.mbarrier_init.release.cluster;
    mov.b32 %r1, 128; mbarrier.arrive.expect_tx.shared.b64 _, [%smem], %r1;
READY:
    mad.lo.s32 %r2, %tid, 4, %smem; mad.lo.s32 %r3, %r60, 1000, %tid; st.shared.b32 [%r2+128], %r3;
    fence.proxy.async.shared::cta;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    @%p1 bra SENT;
    mapa.shared::cluster.u32 %r4, %smem, %r61;
    add.s32 %r5, %r4, 256; add.s32 %r6, %smem, 128;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r5], [%r6], 128, [%r4];
SENT:"""
        + wait(0)
        + """
    ld.shared.b32 %r7, [%r2+256]; cvt.u64.u32 %d1, %r7;
    mul.wide.u32 %d2, %r60, 256; add.s64 %out, %out, %d2; st.global.b64 [%out], %d1;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    )
    out = np.zeros(64, np.uint64)
    run_body(body, (), out, grid=2, cluster=2, schedule=Schedule.parse(schedule), check=True)
    assert (out == np.concatenate([1000 + np.arange(32), np.arange(32)])).all()
    with pytest.raises(EmulatorError):
        without = body.replace(
            "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "", 1
        )
        run_body(without, (), out, grid=2, cluster=2, check=True)


def test_cluster_registers() -> None:
    body = """
    mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, %cluster_nctarank; mov.u32 %r3, %clusterid.x;
    mov.u32 %r4, %ctaid.x; mad.lo.s32 %r1, %r1, 10, %r2; mad.lo.s32 %r1, %r3, 100, %r1;
    mad.lo.s32 %r1, %r4, 1000, %r1; cvt.u64.u32 %d1, %r1;
    mul.wide.u32 %d2, %r4, 8; add.s64 %d3, %in0, %d2; st.global.b64 [%d3], %d1;"""
    out = np.zeros(4, np.uint64)
    run_body(body, (out,), np.zeros(32, np.uint64), grid=4, cluster=2)
    assert out.tolist() == [2, 1012, 2102, 3112]


def test_remote_arrival() -> None:
    """The last CTA of the pair arrives at the first one's mbarrier."""
    body = (
        """
    mov.u32 %r60, %cluster_ctarank; setp.ne.u32 %p1, %tid, 0; @%p1 bra READY;
    mbarrier.init.shared.b64 [%smem], 1; fence.mbarrier_init.release.cluster;
READY:
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    setp.eq.u32 %p2, %r60, 0; @%p2 bra WAITING; @%p1 bra OUT;
    mov.b32 %r1, 0; mapa.shared::cluster.u32 %r2, %smem, %r1;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    bra OUT;
WAITING:"""
        + wait(0)
        + """
OUT:
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    )
    for schedule in SCHEDULES:
        options = {"grid": 2, "cluster": 2, "schedule": Schedule.parse(schedule), "check": True}
        run_body(body, (), np.zeros(32, np.uint64), **options)
