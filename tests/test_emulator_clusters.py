# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (an instruction is one line)
"""CTAs that communicate through global memory: small kernels that do it right, in every schedule, and
the same with each defect."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
from emulator.errors import Deadlock, Livelock, RaceError
from emulator.harness import run_body
from emulator.schedule import Schedule

SCHEDULES = ("eager", "late", "random:1", "random:2", "random:3", "pct:1", "pct:2")
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def run(body: str, *inputs: np.ndarray, grid: int, schedule: str = "eager", **options):
    """Run CTAs of a warp under the happens-before check; they share an output of a 64-bit word per
    thread."""
    options = {"check": True, "block": 32, "schedule": Schedule.parse(schedule), **options}
    return run_body(body, inputs, np.zeros(options["block"], np.uint64), grid=grid, **options)


# The CTA's number in %r50, and that many words into the flags, %in0, in %d50.
WHERE = "mov.u32 %r50, %ctaid.x; mul.wide.u32 %d50, %r50, 4; add.s64 %d50, %in0, %d50;"


def poll(place: str, until: str, order: str = ".acquire.gpu", name: str = "POLL") -> str:
    """Lane 0 reads until it sees at least `until`; the others wait."""
    return f"""
    setp.ne.u32 %p15, %tid, 0; @%p15 bra {name}_END;
{name}:
    ld{order}.global.b32 %r60, [{place}];
    setp.lt.u32 %p14, %r60, {until};
    @%p14 bra {name};
{name}_END:
    bar.warp.sync -1;"""


def publish(place: str, value: str, store: str = "st.release.gpu.global.b32") -> str:
    return f"bar.warp.sync -1; setp.ne.u32 %p15, %tid, 0; @!%p15 {store} [{place}], {value};"


# Tile counter -------------------------------------------------------------------------------------

# Each CTA takes tiles from %in0 until there are none, and writes its number + 1 into the tile's word.
TILES = """
    mov.u32 %r50, %ctaid.x; add.s32 %r50, %r50, 1;
    setp.ne.u32 %p1, %tid, 0;
NEXT:
    @!%p1 {atom} %r1, [%in0], 1;
    shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;
    setp.ge.u32 %p2, %r1, 40;
    @%p2 bra END;
    mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %in1, %d1;
    @!%p1 st.global.b32 [%d1], %r50;
    bra NEXT;
END:"""


@schedules
@pytest.mark.parametrize("atom", ["atom.global.add.u32", "atom.global.acq_rel.add.u32"])
def test_a_tile_counter(atom: str, schedule: str) -> None:
    """Each tile is computed once; not all by one CTA, but in the latest order."""
    counter, owners = np.zeros(1, np.uint32), np.zeros(40, np.uint32)
    body = TILES.format(atom=atom)
    run(body, counter, owners, grid=4, resident_ctas=3, schedule=schedule)
    assert counter[0] == 40 + 4
    assert (owners > 0).all()
    taken = np.bincount(owners, minlength=5)[1:]
    if schedule == "eager":
        assert list(taken) == [14, 13, 13, 0]
    elif schedule.startswith("random"):
        assert np.count_nonzero(taken) >= 2


def test_a_tile_counter_that_is_no_counter() -> None:
    """Two CTAs take the same tile: a load and a store instead of the atomic operation."""
    take = "ld.relaxed.gpu.global.b32 %r1, [%in0]; @!%p1 add.s32 %r2, %r1, 1; @!%p1 st.relaxed.gpu.global.b32 [%in0], %r2;"
    body = TILES.replace("{atom} %r1, [%in0], 1;", take)
    with pytest.raises(RaceError, match="write by warp 0 .* is not ordered after the write by"):
        for seed in range(20):
            arguments = np.zeros(1, np.uint32), np.zeros(40, np.uint32)
            run(body, *arguments, grid=3, schedule=f"random:{seed}")


# Handing over data --------------------------------------------------------------------------------

# CTA {producer} writes 32 words to %in1 and sets a flag, the other reads them.
HAND_OVER = """
    mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %in1, %d1;
    mov.u32 %r50, %ctaid.x; setp.ne.u32 %p1, %r50, {producer}; @%p1 bra CONSUME;
    add.s32 %r1, %tid, 7;
    st.global.b32 [%d1], %r1;
    {release}
    bra END;
CONSUME:
    {acquire}
    ld.global.b32 %r2, [%d1]; cvt.u64.u32 %d2, %r2; st.global.b64 [%out], %d2;
END:"""
RELEASES = {
    "store": publish("%in0", "1"),
    "store, order behind the space": publish("%in0", "1", "st.global.release.gpu.b32"),
    "reduction": publish("%in0", "1", "red.release.gpu.global.add.u32"),
    "atomic": publish("%in0", "1", "atom.global.release.add.u32 %r9,"),
    "exchange": publish("%in0", "1", "atom.acq_rel.gpu.global.exch.b32 %r9,"),
    "fence": "bar.warp.sync -1; fence.acq_rel.gpu;"
    + publish("%in0", "1", "st.relaxed.gpu.global.b32"),
    "membar": "bar.warp.sync -1; membar.gl;" + publish("%in0", "1", "red.global.add.u32"),
}
ACQUIRES = {
    "load": poll("%in0", "1"),
    "load, order behind the space": poll("%in0", "1").replace("ld.acquire.gpu.global", "ld.global.acquire.gpu"),
    "system": poll("%in0", "1", ".acquire.sys"),
    "fence": poll("%in0", "1", ".relaxed.gpu") + "fence.acq_rel.gpu;",
    "volatile, membar": poll("%in0", "1", ".volatile") + "membar.gl;",
    "backing off": poll("%in0", "1").replace("POLL;", "POLL_MORE; bra POLL_END; POLL_MORE: nanosleep.u32 100; bra POLL;"),
    "atomic": poll("%in0", "1").replace("ld.acquire.gpu.global.b32 %r60, [%in0]", "atom.acquire.gpu.global.add.u32 %r60, [%in0], 0"),
    "exchange": poll("%in0", "1").replace("ld.acquire.gpu.global.b32 %r60, [%in0]", "atom.global.acquire.cas.b32 %r60, [%in0], 1, 2"),
}  # fmt: skip


def hand_over(release: str, acquire: str, producer: int, **options) -> np.ndarray:
    body = HAND_OVER.format(producer=producer, release=release, acquire=acquire)
    return run(body, np.zeros(1, np.uint32), np.zeros(32, np.uint32), grid=2, **options)


@schedules
@pytest.mark.parametrize("producer", [0, 1])
@pytest.mark.parametrize("release", RELEASES)
def test_releases(release: str, producer: int, schedule: str) -> None:
    got = hand_over(RELEASES[release], ACQUIRES["load"], producer, schedule=schedule)
    assert (got == np.arange(32) + 7).all()


@schedules
@pytest.mark.parametrize("producer", [0, 1])
@pytest.mark.parametrize("acquire", ACQUIRES)
def test_acquires(acquire: str, producer: int, schedule: str) -> None:
    got = hand_over(RELEASES["store"], ACQUIRES[acquire], producer, schedule=schedule)
    assert (got == np.arange(32) + 7).all()


NO_RELEASE = {
    "relaxed": publish("%in0", "1", "st.relaxed.gpu.global.b32"),
    "volatile": publish("%in0", "1", "st.volatile.global.b32"),
    "reduction": publish("%in0", "1", "red.relaxed.gpu.global.add.u32"),
    "fence of the CTA": "fence.acq_rel.cta;" + publish("%in0", "1", "st.relaxed.gpu.global.b32"),
    "fence too late": publish("%in0", "1", "st.relaxed.gpu.global.b32") + "fence.acq_rel.gpu;",
    "scope of the CTA": publish("%in0", "1", "red.release.cta.global.add.u32"),
    "weak": publish("%in0", "1", "st.global.b32"),
}
NO_ACQUIRE = {
    "relaxed": poll("%in0", "1", ".relaxed.gpu"),
    "volatile": poll("%in0", "1", ".volatile"),
    "fence too early": "fence.acq_rel.gpu;" + poll("%in0", "1", ".relaxed.gpu"),
    "not yet": "ld.global.b32 %r3, [%d1];" + poll("%in0", "1"),
    "relaxed atomic": ACQUIRES["atomic"].replace("atom.acquire", "atom.relaxed"),
}


@schedules
@pytest.mark.parametrize("producer", [0, 1])
@pytest.mark.parametrize("defect", [*NO_RELEASE, *("no acquire: " + name for name in NO_ACQUIRE)])
def test_data_that_nothing_hands_over(defect: str, producer: int, schedule: str) -> None:
    release = NO_RELEASE.get(defect, RELEASES["store"])
    acquire = NO_ACQUIRE.get(defect.removeprefix("no acquire: "), ACQUIRES["load"])
    if defect in NO_RELEASE:
        acquire = ACQUIRES["load"]
    with pytest.raises(RaceError, match=r"global memory race on p[01] at byte \d+: "):
        hand_over(release, acquire, producer, schedule=schedule)


def test_a_later_store_of_the_flag_ends_the_release() -> None:
    late = publish("%in0", "1") + publish("%in0", "2", "st.relaxed.gpu.global.b32")
    with pytest.raises(RaceError, match="read by .* is not ordered after the write by"):
        hand_over(late, poll("%in0", "2"), 1)
    continued = publish("%in0", "1") + publish("%in0", "1", "red.relaxed.gpu.global.add.u32")
    hand_over(continued, poll("%in0", "2"), 1)


def test_what_another_warp_wrote_is_released_after_a_barrier() -> None:
    """Warp 1 writes, warp 0 publishes; warp 0 acquires, warp 1 reads."""
    body = """
    setp.lt.u32 %p9, %tid, 32; mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %in1, %d1;
    mov.u32 %r50, %ctaid.x; setp.ne.u32 %p1, %r50, 1; @%p1 bra CONSUME;
    @!%p9 st.global.b32 [%d1], %tid;
    {barrier}
    setp.eq.u32 %p2, %tid, 0; @%p2 st.release.gpu.global.b32 [%in0], 1;
    bra END;
CONSUME:
    @!%p9 bra READ;
    {poll}
READ:
    bar.sync 1, 64;
    @!%p9 ld.global.b32 %r2, [%d1];
END:"""
    for barrier in ("bar.sync 2, 64;", ""):
        text = body.format(barrier=barrier, poll=poll("%in0", "1"))
        arguments = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
        if barrier:
            run(text, *arguments, grid=2, block=64)
            continue
        with pytest.raises(
            RaceError, match="p1 at byte 128: .* not ordered after the .* by warp 1"
        ):
            run(text, *arguments, grid=2, block=64)


# Chains of CTAs -----------------------------------------------------------------------------------

# Each CTA but the first of the chain waits for its predecessor's flag, appends its number to the sum
# at %in1 as another digit, and sets its own flag.
CHAIN = (
    WHERE
    + """
    setp.eq.u32 %p1, %r50, {first}; @%p1 bra GO;
    {poll}
GO:
    ld.global.b32 %r2, [%in1]; mad.lo.u32 %r2, %r2, 10, %r50;
    bar.warp.sync -1; setp.eq.u32 %p2, %tid, 0; @%p2 st.global.b32 [%in1], %r2;
    {publish}"""
)


def chain(descending: bool, **options) -> int:
    """The digits, in the order of the additions; 6 CTAs."""
    first, predecessor = (5, "%d50+4") if descending else (0, "%d50+-4")
    body = CHAIN.format(first=first, poll=poll(predecessor, "1"), publish=publish("%d50", "1"))
    flags, total = np.zeros(6, np.uint32), np.zeros(1, np.uint32)
    run(body, flags, total, grid=6, **options)
    return int(total[0])


@schedules
@pytest.mark.parametrize("resident", [6, 132])
def test_a_chain_in_either_order(resident: int, schedule: str) -> None:
    assert chain(descending=False, schedule=schedule, resident_ctas=resident) == 12345
    assert chain(descending=True, schedule=schedule, resident_ctas=resident) == 543210


@schedules
@pytest.mark.parametrize("resident", [1, 2, 5])
def test_a_chain_with_few_resident(resident: int, schedule: str) -> None:
    """CTAs that wait for earlier ones always end; for later ones, if these can start."""
    assert chain(descending=False, schedule=schedule, resident_ctas=resident) == 12345
    with pytest.raises(Deadlock) as raised:
        chain(descending=True, schedule=schedule, resident_ctas=resident)
    message = str(raised.value)
    assert "kernel: deadlock between CTAs: all that run wait for others" in message
    assert f"CTA ({resident}, 0, 0) and later ones haven't started: {resident} clusters" in message
    for cta in range(resident):
        place = rf"warp 0 \(warp\) of CTA \({cta}, 0, 0\): waits for a change of p0 at byte "
        place += rf"{4 * cta + 4} \(0x\w+\), where it sees 0, at PTX line \d+"
        assert re.search(place, message)


def test_a_deadlock_says_who_polls_what() -> None:
    """Two CTAs that wait for each other; the other warp of each waits for the one that polls."""
    body = (
        WHERE
        + "xor.b32 %r51, %r50, 1; mul.wide.u32 %d51, %r51, 4; add.s64 %d51, %in0, %d51;"
        + "setp.ge.u32 %p9, %tid, 32; @%p9 bra DONE;"
        + poll("%d51", "3", ".relaxed.gpu")
        + "DONE: bar.sync 1, 64;"
        + publish("%d50", "3")
    )
    roles = ("load", "mma")
    with pytest.raises(Deadlock) as raised:
        run(body, np.array([1, 2], np.uint32), grid=2, block=64, warps={"roles": roles.__getitem__})
    message = str(raised.value)
    assert re.search(r"warp 0 \(load\) of CTA \(0, 0, 0\): .* p0 at byte 4 .* sees 2, at", message)
    assert re.search(r"warp 0 \(load\) of CTA \(1, 0, 0\): .* p0 at byte 0 .* sees 1, at", message)
    assert message.count("(mma) of CTA") == 4 and "named barrier 1 of CTA 0 (32 of 64" in message
    assert "haven't started" not in message


def test_a_lane_for_each_flag() -> None:
    """Lane i waits for CTA i's flag: all lanes poll until the last has seen its own."""
    body = (
        WHERE
        + """
    setp.eq.u32 %p1, %r50, 0; @%p1 bra WAIT;
    """
        + publish("%d50", "1")
        + """
    bra END;
WAIT:
    min.u32 %r3, %tid, 3; add.s32 %r3, %r3, 1; mul.wide.u32 %d3, %r3, 4; add.s64 %d3, %in0, %d3;
LOOP:
    ld.acquire.gpu.global.b32 %r4, [%d3];
    setp.eq.u32 %p2, %r4, 0; @%p2 bra LOOP;
END:"""
    )
    for schedule in SCHEDULES:
        run(body, np.zeros(5, np.uint32), grid=5, schedule=schedule)
    with pytest.raises(Deadlock, match=r"CTA \(0, 0, 0\): .* byte 12 .* byte 16 .* sees 0"):
        run(body, np.zeros(5, np.uint32), grid=3)


def test_a_bounded_number_of_attempts() -> None:
    """A loop that gives up isn't a deadlock."""
    body = """
    mov.b32 %r2, 0;
LOOP:
    ld.relaxed.gpu.global.b32 %r1, [%in0]; add.s32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 50;
    @%p1 bra LOOP;
    cvt.u64.u32 %d2, %r2; st.global.b64 [%out], %d2;"""
    assert (run(body, np.zeros(1, np.uint32), grid=1) == 50).all()


def test_polling_with_weak_loads_is_found() -> None:
    """A compiler may read once; the emulator doesn't let others go on."""
    with pytest.raises(Livelock):
        hand_over(RELEASES["store"], poll("%in0", "1", ""), 1)


# Ordered additions --------------------------------------------------------------------------------

# The chain again, with an addition of 4 floats at %in1 by a bulk reduction. In float32 every order
# of the CTAs has its own sums, but for the first two.
ADDENDS = np.random.default_rng(12).standard_normal((4, 4)).astype(np.float32)
ADD = (
    WHERE
    + """
    and.b32 %r2, %tid, 3; mad.lo.u32 %r2, %r50, 4, %r2; mul.wide.u32 %d2, %r2, 4; add.s64 %d2, %in2, %d2;
    ld.global.b32 %r2, [%d2];
    setp.lt.u32 %p3, %tid, 4; mad.lo.u32 %r3, %tid, 4, %smem; @%p3 st.shared.b32 [%r3], %r2;
    fence.proxy.async.shared::cta; bar.warp.sync -1;
    setp.eq.u32 %p1, %r50, {first}; @%p1 bra GO;
    {poll}
GO:
    setp.ne.u32 %p4, %tid, 0; @%p4 bra ADDED;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%in1], [%smem], 16;
    cp.async.bulk.commit_group;
    {wait}
ADDED:
    {publish}
    @%p4 bra END;
    cp.async.bulk.wait_group{at_exit} 0;
END:"""
)
WAITS = {
    "none": "",
    "of the sources": "cp.async.bulk.wait_group.read 0;",
    "all": "cp.async.bulk.wait_group 0;",
}


def add(descending: bool, wait: str, at_exit: str = ".read", **options) -> np.ndarray:
    first, predecessor = (3, "%d50+4") if descending else (0, "%d50+-4")
    body = ADD.format(
        first=first,
        poll=poll(predecessor, "1"),
        publish=publish("%d50", "1"),
        wait=wait,
        at_exit=at_exit,
    )
    total = np.zeros(4, np.float32)
    run(body, np.zeros(4, np.uint32), total, ADDENDS, grid=4, **options)
    return total


def sums(order: Sequence[int]) -> np.ndarray:
    total = np.zeros(4, np.float32)
    for cta in order:
        total += ADDENDS[cta]
    return total


def expected_sum(descending: bool) -> np.ndarray:
    return sums(range(3, -1, -1) if descending else range(4))


def test_every_order_has_its_sum() -> None:
    orders = list(itertools.permutations(range(4)))
    assert len({sums(order).tobytes() for order in orders}) == len(orders) / 2


@schedules
@pytest.mark.parametrize("descending", [False, True])
def test_ordered_additions(descending: bool, schedule: str) -> None:
    total = add(descending, WAITS["all"], schedule=schedule, ordered_additions=True)
    assert (total == expected_sum(descending)).all()


@schedules
@pytest.mark.parametrize("wait", ["none", "of the sources"])
def test_additions_published_before_they_are_complete(wait: str, schedule: str) -> None:
    pattern = "addition by writes of bulk stores of .* is not ordered after the addition by writes"
    with pytest.raises(RaceError, match=pattern):
        add(True, WAITS[wait], schedule=schedule, ordered_additions=True)
    add(True, WAITS[wait], schedule=schedule)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("at_exit", ["", ".read"])
def test_a_missing_wait_changes_bits(descending: bool, at_exit: str) -> None:
    for wait in ("none", "of the sources"):
        total = add(descending, WAITS[wait], at_exit, schedule="late", check=False)
        assert (total != expected_sum(descending)).any()
    totals = {
        add(descending, WAITS["of the sources"], at_exit, schedule=f"random:{i}").tobytes()
        for i in range(8)
    }
    assert len(totals) > 1


def test_additions_of_one_warp_that_nothing_orders() -> None:
    body = """
    mad.lo.u32 %r3, %tid, 4, %smem; st.shared.b32 [%r3], 0;
    fence.proxy.async.shared::cta; bar.warp.sync -1;
    setp.ne.u32 %p4, %tid, 0; @%p4 bra END;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%in0], [%smem], 16;
    cp.async.bulk.commit_group;
    {wait}
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%in0], [%smem], 16;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
END:"""
    total = np.zeros(4, np.float32)
    run(body.format(wait=WAITS["all"]), total, grid=1, ordered_additions=True)
    for wait in ("none", "of the sources"):
        with pytest.raises(RaceError, match="addition by writes of bulk stores of warp 0"):
            run(body.format(wait=WAITS[wait]), total, grid=1, ordered_additions=True)


def test_a_sum_read_before_it_is_complete() -> None:
    """The last CTA of the chain reads the sum."""
    body = ADD.replace("END:", "END: setp.eq.u32 %p5, %r50, 3; @%p5 ld.global.b32 %r9, [%in1];")
    for wait, exit_wait in (("none", ".read"), ("all", "")):
        text = body.format(
            first=0,
            poll=poll("%d50+-4", "1"),
            publish=publish("%d50", "1"),
            wait=WAITS[wait],
            at_exit=exit_wait,
        )
        arguments = np.zeros(4, np.uint32), np.zeros(4, np.float32), ADDENDS
        if wait == "all":
            run(text, *arguments, grid=4)
            continue
        with pytest.raises(RaceError, match="read by warp 0 .* is not ordered after the addition"):
            run(text, *arguments, grid=4)
