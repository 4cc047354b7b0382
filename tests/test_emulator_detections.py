# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (an instruction, or a row of a table, is one line)
"""What the emulator must notice: a small kernel with each defect, and the same kernel without
it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator import scheduler
from emulator.errors import (
    BarrierError,
    Deadlock,
    Livelock,
    Misaligned,
    OutOfBounds,
    Poison,
    ProtocolError,
    RaceError,
)
from emulator.harness import run_body
from emulator.schedule import Schedule


def run(body: str, *inputs: np.ndarray, block: int = 64, **options) -> np.ndarray:
    """Run a body under the happens-before check; one 64-bit word a thread comes back."""
    grid = options.get("grid", 1)
    options = {"check": True, **options}
    return run_body(body, inputs, np.zeros(block * grid, np.uint64), block=block, **options)


# Warp 0 initialises the mbarrier at the start of shared memory; everyone then sees it.
INIT = """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%smem], {count};
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
"""
WAIT = """
{{
    .reg .pred done;
WAITING:
    mbarrier.try_wait.parity.shared.b64 done, [%smem], {parity}, 1000;
    @done bra PASSED;
    bra WAITING;
PASSED:
}}
"""


def initialised(count: int = 1) -> str:
    return INIT.format(count=count)


def wait(parity: int = 0) -> str:
    return WAIT.format(parity=parity)


# Data goes from warp 0 to warp 1 through shared memory at byte 64 and more.
WRITE = "mad.lo.s32 %r1, %tid, 4, %smem; @!%p1 st.shared.b32 [%r1+64], %tid;"
SPLIT_WARPS = "setp.ne.u32 %p1, %warp, 0;"
READ = "@%p1 ld.shared.b32 %r2, [%r1+-64];"


def test_deadlock_says_who_waits_for_what() -> None:
    body = initialised(2) + "setp.ne.u32 %p2, %tid, 0; @!%p2 mbarrier.arrive.shared.b64 _, [%smem];"
    with pytest.raises(Deadlock) as raised:
        run(body + wait())
    message = str(raised.value)
    assert "kernel: deadlock in CTA (0, 0, 0)" in message
    assert message.count("waits for mbarrier CTA 0+0x400 to pass parity 0") == 2
    assert "pending 1/2 arrivals, 0 bytes expected" in message
    assert re.search(r"warp 1 \(warp\) of CTA \(0, 0, 0\): .* at PTX line \d+", message)


def test_deadlock_at_a_named_barrier() -> None:
    body = "setp.ne.u32 %p1, %warp, 0; @%p1 bra OUT; bar.sync 3, 64; OUT:"
    with pytest.raises(
        Deadlock, match=r"named barrier 3 of CTA 0 \(32 of 64 threads arrived: warp 0"
    ):
        run(body)


def test_roles_are_named() -> None:
    with pytest.raises(Deadlock, match=r"warp 0 \(load\) of CTA"):
        run("bar.sync 1, 96;", warps={"roles": ("load", "mma").__getitem__})


def test_the_message_has_kernel_warp_line_and_instruction() -> None:
    with pytest.raises(
        OutOfBounds, match=r"kernel: warp 0 \(warp\) of CTA \(0, 0, 0\): PTX line \d+: ld.shared"
    ):
        run("ld.shared.b32 %r1, [%smem+5000];")


# Barriers -----------------------------------------------------------------------------------------


def test_too_many_arrivals() -> None:
    body = (
        initialised(1) + "setp.lt.u32 %p2, %tid, 1; @%p2 mbarrier.arrive.shared.b64 _, [%smem], 2;"
    )
    with pytest.raises(BarrierError, match="arrivals exceed the expected count: 2 of 1"):
        run(body)


def test_a_count_that_changes_at_a_named_barrier() -> None:
    body = SPLIT_WARPS + "@%p1 bra OUT; bar.arrive 1, 32; OUT: bar.arrive 1, 64; bar.arrive 1, 32;"
    with pytest.raises(BarrierError, match="32 threads expected here, 64 by warp 0"):
        run(body)


def test_inconsistent_counts_at_a_named_barrier() -> None:
    body = SPLIT_WARPS + "@%p1 bra OTHER; bar.arrive 1, 64; bra OUT; OTHER: bar.arrive 1, 96; OUT:"
    with pytest.raises(BarrierError, match="96 threads expected here, 64 by warp 0"):
        run(body)


def test_uninitialised_mbarrier() -> None:
    with pytest.raises(BarrierError, match="0x400 is not an initialised mbarrier"):
        run("mbarrier.arrive.shared.b64 _, [%smem];")


def test_mbarrier_initialised_while_in_use() -> None:
    body = (
        initialised(2)
        + """
    setp.ne.u32 %p2, %tid, 0; @%p2 bra OUT;
    mbarrier.arrive.shared.b64 _, [%smem];
    mbarrier.init.shared.b64 [%smem], 2;
OUT:"""
    )
    with pytest.raises(BarrierError, match="initialised again while in use"):
        run(body)


def test_use_of_an_mbarrier_that_nothing_orders_after_its_initialisation() -> None:
    unordered = (
        initialised().replace("bar.sync 0;", "")
        + SPLIT_WARPS
        + """
    @!%p1 bra OUT; mbarrier.test_wait.parity.shared.b64 %p2, [%smem], 0; OUT:"""
    )
    with pytest.raises((RaceError, BarrierError), match="mbarrier"):
        run(unordered)


# Transactions -------------------------------------------------------------------------------------

COPY = """
    setp.ne.u32 %p2, %tid, 0; @%p2 bra COPIED;
    {announce}
    add.s32 %r5, %smem, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%in0], 64, [%smem];
    add.s32 %r5, %smem, 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%in0], 64, [%smem];
COPIED:
"""


def copy(size: int | None) -> str:
    announce = f"mov.b32 %r4, {size}; mbarrier.arrive.expect_tx.shared.b64 _, [%smem], %r4;"
    if size is None:
        announce = "mbarrier.arrive.shared.b64 _, [%smem];"
    return COPY.format(announce=announce)


SOURCE = np.arange(16, dtype=np.uint32)
SCHEDULES = ("eager", "late", "random:3", "pct:3")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bulk_copies_land(schedule: str) -> None:
    body = (
        initialised()
        + copy(128)
        + wait()
        + """
    and.b32 %r7, %tid, 15; mad.lo.s32 %r7, %r7, 4, %smem;
    ld.shared.b32 %r8, [%r7+256]; cvt.u64.u32 %d1, %r8; st.global.b64 [%out], %d1;"""
    )
    got = run(body, SOURCE, schedule=Schedule.parse(schedule))
    assert (got == np.arange(64) % 16).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [64, 112, None])
def test_too_few_bytes_announced(schedule: str, size: int | None) -> None:
    with pytest.raises(
        (BarrierError, ProtocolError, Deadlock), match="transaction count|bytes expected"
    ):
        run(initialised() + copy(size) + wait(), SOURCE, schedule=Schedule.parse(schedule))


def test_too_many_bytes_announced() -> None:
    with pytest.raises(Deadlock, match="pending 0/1 arrivals, 16 bytes expected"):
        run(initialised() + copy(144) + wait(), SOURCE)


def test_a_copy_by_every_lane() -> None:
    body = initialised() + copy(128).replace(
        "setp.ne.u32 %p2, %tid, 0;", SPLIT_WARPS + "mov.pred %p2, %p1;"
    )
    with pytest.raises((ProtocolError, BarrierError), match="elect one|exceed"):
        run(body + wait(), SOURCE)


def test_mbarrier_without_its_fence() -> None:
    body = (initialised() + copy(128) + wait()).replace("fence.mbarrier_init.release.cluster;", "")
    with pytest.raises(RaceError, match="without fence.mbarrier_init"):
        run(body, SOURCE)


def test_data_read_before_the_wait() -> None:
    body = initialised() + copy(128) + "ld.shared.b32 %r8, [%smem+256];" + wait()
    body = body.replace("ld.shared", "@!%p2 ld.shared")
    with pytest.raises(
        RaceError, match="read by warp 0 .* not ordered after the write by copies of"
    ):
        run(body, SOURCE)


def test_misaligned_bulk_copy() -> None:
    body = initialised() + copy(128).replace("%smem, 128", "%smem, 132") + wait()
    with pytest.raises(Misaligned, match="expected multiples of 16"):
        run(body, SOURCE)


def test_bulk_copy_beyond_the_buffer() -> None:
    with pytest.raises(OutOfBounds, match="nearest is p0, 32 bytes, at byte 0"):
        run(initialised() + copy(128) + wait(), SOURCE[:8].copy())


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.b64 %d1, [%out+512];",
        "st.global.b64 [%out+512], %d1;",
        "ld.global.b64 %d1, [%out+-8];",
    ],
)
def test_global_access_out_of_bounds(instruction: str) -> None:
    with pytest.raises(
        OutOfBounds, match=r"8 bytes at 0x\w+ \(access \d+\); nearest is p0, 512 bytes"
    ):
        run(instruction)


def test_misaligned_global_access() -> None:
    with pytest.raises(Misaligned, match="8 bytes"):
        run("add.s64 %d2, %out, 4; ld.global.b64 %d1, [%d2];")


@pytest.mark.parametrize(
    "instruction", ["ld.shared.b32 %r1, [%smem+4096];", "st.shared.b32 [%smem+-4], %r1;"]
)
def test_shared_access_out_of_bounds(instruction: str) -> None:
    with pytest.raises(OutOfBounds, match="shared memory access out of bounds: 4 bytes"):
        run(instruction)


def test_misaligned_shared_access() -> None:
    with pytest.raises(Misaligned):
        run("st.shared.v4.b32 [%smem+8], {%r1, %r1, %r1, %r1};")


def test_read_of_unwritten_shared_memory() -> None:
    with pytest.raises(
        Poison, match=r"warp 0 \(warp\) .* reads shared memory at 0x440, which nothing wrote"
    ):
        run("ld.shared.b32 %r1, [%smem+64];")


def test_mbarrier_overwritten() -> None:
    with pytest.raises(RaceError, match="writes shared memory at 0x400, which holds an mbarrier"):
        run(initialised() + "st.shared.b32 [%smem], %tid;")


def test_race_between_warps() -> None:
    body = SPLIT_WARPS + WRITE + READ
    with pytest.raises((RaceError, Poison)):
        run(body, schedule=Schedule.parse("random:1"))
    with pytest.raises(
        RaceError, match=r"race on shared memory at 0x440: read by warp 1 .* write by warp 0"
    ):
        run(body)
    run(SPLIT_WARPS + WRITE + "bar.sync 1, 64;" + READ)


def test_race_of_a_reused_buffer() -> None:
    """Write, barrier, read, write again without a second barrier."""
    body = SPLIT_WARPS + WRITE + "bar.sync 1, 64;" + READ
    with pytest.raises(
        RaceError, match="write by warp 0 .* is not ordered after the read by warp 1"
    ):
        run(body + WRITE, schedule=Schedule.parse("eager"))
    run(body + "bar.sync 2, 64;" + WRITE)


def test_arriving_orders_only_what_came_before() -> None:
    late = SPLIT_WARPS + "@%p1 bra CONSUME; bar.arrive 1, 64; mad.lo.s32 %r1, %tid, 4, %smem;"
    late += "st.shared.b32 [%r1+64], %tid; bra OUT; CONSUME: bar.sync 1, 64;"
    late += "mad.lo.s32 %r1, %tid, 4, %smem; ld.shared.b32 %r2, [%r1+-64]; OUT:"
    with pytest.raises((RaceError, Poison)):
        run(late)


def test_missing_proxy_fence() -> None:
    store = """
    setp.ne.u32 %p1, %warp, 0; mad.lo.s32 %r1, %tid, 4, %smem; st.shared.b32 [%r1+64], %tid;
    {fence}
    bar.sync 1, 64;
    setp.ne.u32 %p2, %tid, 0; @%p2 bra OUT;
    add.s32 %r5, %smem, 64;
    cp.async.bulk.global.shared::cta.bulk_group [%in0], [%r5], 256;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
OUT:"""
    target = np.zeros(64, np.uint32)
    with pytest.raises(RaceError, match="write without fence.proxy.async by warp"):
        run(store.format(fence=""), target)
    run(store.format(fence="fence.proxy.async.shared::cta;"), target)
    assert (target == np.arange(64)).all()


@pytest.mark.parametrize("ending", ["", "cp.async.bulk.commit_group;"])
def test_bulk_store_pending_at_exit(ending: str) -> None:
    body = """
    mad.lo.s32 %r1, %tid, 4, %smem; st.shared.b32 [%r1+64], %tid; fence.proxy.async.shared::cta;
    bar.sync 1, 64;
    setp.ne.u32 %p2, %tid, 0; @%p2 bra OUT;
    add.s32 %r5, %smem, 64;
    cp.async.bulk.global.shared::cta.bulk_group [%in0], [%r5], 256;
    {ending}
OUT:"""
    with pytest.raises(ProtocolError, match="exits with 1 bulk stores that it didn't wait for"):
        run(body.format(ending=ending), np.zeros(64, np.uint32))


def test_source_overwritten_before_the_store_has_read_it() -> None:
    body = """
    mad.lo.s32 %r1, %tid, 4, %smem; st.shared.b32 [%r1+64], %tid; fence.proxy.async.shared::cta;
    bar.sync 1, 64;
    setp.ne.u32 %p2, %tid, 0; @%p2 bra OUT;
    add.s32 %r5, %smem, 64;
    cp.async.bulk.global.shared::cta.bulk_group [%in0], [%r5], 256;
    cp.async.bulk.commit_group;
    {wait}
    st.shared.b32 [%smem+64], 99;
    cp.async.bulk.wait_group 0;
OUT:"""
    target = np.zeros(64, np.uint32)
    with pytest.raises(
        RaceError, match="write by warp 0 .* not ordered after the read by bulk stores of"
    ):
        run(body.format(wait=""), target)
    run(body.format(wait="cp.async.bulk.wait_group.read 0;"), target)
    assert target[0] == 0
    run(body.format(wait=""), target, check=False, schedule=Schedule.parse("late"))
    assert target[0] == 99


def test_race_between_ctas_in_global_memory() -> None:
    both = "st.global.b64 [%in0], %d1;"
    pattern = (
        r"global memory race on p0 at byte 0: write by warp {} \(PTX line \d+\) is not ordered "
    )
    pattern += r"after the write by warp 0 \(warp\) of CTA \(0, 0, 0\) \(PTX line \d+\)"
    with pytest.raises(RaceError, match=pattern.format(r"0 \(warp\) of CTA \(1, 0, 0\)")):
        run(both, np.zeros(4, np.uint64), grid=2, block=32)
    with pytest.raises(RaceError, match=pattern.format(r"1 \(warp\) of CTA \(0, 0, 0\)")):
        run(both, np.zeros(4, np.uint64), block=64)
    own = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %d2, %r1, 8; add.s64 %d3, %in0, %d2; st.global.b64 [%d3], %d2;"
    run(own, np.zeros(4, np.uint64), grid=2, block=32)
    run("red.global.add.u32 [%in0], 1;", np.zeros(4, np.uint64), grid=2)
    with pytest.raises(RaceError, match="reduction by .* is not ordered after the read by warp 0"):
        run(
            "red.global.add.u32 [%in0], 1; ld.global.b32 %r1, [%in0];",
            np.zeros(4, np.uint64),
            grid=2,
        )


# Protocols ----------------------------------------------------------------------------------------


def test_register_budget() -> None:
    """64 threads of 64 registers: 2 x 32 x 40 given back pay for 2 x 32 x 32 more, not for 48
    more."""
    body = SPLIT_WARPS + "@%p1 bra MORE; setmaxnreg.dec.sync.aligned.u32 24; bra OUT; MORE:"
    run(body + "setmaxnreg.inc.sync.aligned.u32 104; OUT:", warps={"registers_per_thread": 64})
    with pytest.raises(
        Deadlock, match="setmaxnreg.inc to 112: 1536 more registers, 1280 registers are free"
    ):
        run(body + "setmaxnreg.inc.sync.aligned.u32 112; OUT:", warps={"registers_per_thread": 64})


@pytest.mark.parametrize(
    "instruction", ["inc.sync.aligned.u32 32", "dec.sync.aligned.u32 72", "dec.sync.aligned.u32 30"]
)
def test_wrong_register_counts(instruction: str) -> None:
    with pytest.raises(ProtocolError, match="setmaxnreg"):
        run(f"setmaxnreg.{instruction};", warps={"registers_per_thread": 64})


def test_lanes_at_different_sync_instructions() -> None:
    body = """
    setp.eq.u32 %p1, %tid, 0; @%p1 bra OTHER;
    shfl.sync.idx.b32 %r1, %tid, 0, 31, -1; bra OUT;
OTHER:
    shfl.sync.idx.b32 %r2, %tid, 0, 31, -1;
OUT:"""
    with pytest.raises(
        ProtocolError, match=r"different .sync instructions: .* \(1 lanes\), \d+ \(31 lanes\)"
    ):
        run(body, block=32)


def test_polling_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_BLOCKS", 1000)
    body = "LOOP: ld.global.b32 %r1, [%in0]; setp.eq.b32 %p1, %r1, 0; @%p1 bra LOOP;"
    with pytest.raises(Livelock, match="warp 0 .* ran"):
        run(body, np.zeros(1, np.uint32), block=32, check=False)


def test_trap() -> None:
    with pytest.raises(ProtocolError, match="trap"):
        run("setp.eq.u32 %p1, %tid, 40; @%p1 trap;")
