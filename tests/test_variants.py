# SPDX-License-Identifier: Apache-2.0
"""Laws of the table: what any edit of it has to keep."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fa4_jax import _variants
from fa4_jax._variants import (
    BLOCK,
    FEATURE_SETS,
    HEAD_DIM_MULTIPLE,
    MAX_DIMENSION,
    ROW_MULTIPLE,
    VARIANTS,
    Arch,
    DType,
    Feature,
    Kernel,
    Variant,
    built_head_dims,
    kernel_key,
    round_up,
    served_arches,
    target_name,
)

# Written down, so that a row lost or doubled by an edit of the table is seen.
NUM_ROWS = 198

SIGNATURES = {(v.kernel, v.features): v.signature for v in VARIANTS}
BACKWARD = (Kernel.backward_preprocess, Kernel.backward, Kernel.backward_postprocess)


def test_number_of_rows() -> None:
    assert len(VARIANTS) == NUM_ROWS


def test_names_are_unique() -> None:
    assert len({v.name for v in VARIANTS}) == len(VARIANTS)
    assert len({(v.key, v.arch) for v in VARIANTS}) == len(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_names_say_what_a_row_is(variant: Variant) -> None:
    """And are C identifiers: a name is the prefix of the exported functions."""
    parts = (variant.kernel, variant.arch, variant.dtype, f"d{variant.head_dim}", *variant.features)
    assert all(part in variant.name for part in parts)
    assert re.fullmatch(r"fa4_[a-z0-9_]+", variant.name)
    assert variant.arch not in variant.key
    assert variant.name.replace(f"_{variant.arch}", "") == f"fa4_{variant.key}"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_no_key_is_read_as_another(variant: Variant) -> None:
    same = [v for v in VARIANTS if v.arch == variant.arch and v.key == variant.key]
    assert same == [variant]


def test_keys_of_features_and_of_head_dims_that_differ() -> None:
    key = kernel_key(Kernel.backward, DType.f16, (192, 128), (Feature.interval, Feature.softcap))
    assert key == "backward_f16_d192_128_interval_softcap"
    assert kernel_key(Kernel.forward, DType.bf16, (64, 64)) == "forward_bf16_d64"


def test_forward_and_backward_have_every_set_of_features() -> None:
    for kernel in (Kernel.forward, Kernel.backward):
        rows = [
            {
                (v.arch, v.dtype, v.head_dim, v.head_dim_v): v.tiles
                for v in VARIANTS
                if (v.kernel, v.features) == (kernel, features)
            }
            for features in FEATURE_SETS[kernel]
        ]
        assert all(row.keys() == rows[0].keys() for row in rows), kernel
        # Tiles are tuned once for all sets; but pairs of CTAs don't take tiles from a queue, and
        # where there is more to compute, the source's order may be another, and fewer registers
        # are left.
        for place, tiles in rows[0].items():
            others = {row[place] for row in rows[1:]} or {tiles}
            (other,) = others
            free = {"softmax": other.softmax, "v_columns": other.v_columns}
            alike = dataclasses.replace(tiles, **free)
            assert other.v_columns <= tiles.v_columns, (kernel, place)
            assert tiles.ctas == 2 or alike == other, (kernel, place)
            assert other.ctas == 1, (kernel, place)
    others = (Kernel.backward_preprocess, Kernel.backward_postprocess)
    assert not any(v.features for v in VARIANTS if v.kernel in others)


def test_every_backward_is_whole() -> None:
    """A backward row has its preprocess, postprocess and forward; no auxiliary row is alone."""
    by_kernel = {
        kernel: {
            (v.arch, v.dtype, v.head_dim, v.head_dim_v) for v in VARIANTS if v.kernel is kernel
        }
        for kernel in Kernel
    }
    assert by_kernel[Kernel.backward] <= by_kernel[Kernel.forward]
    for kernel in BACKWARD:
        assert by_kernel[kernel] == by_kernel[Kernel.backward], kernel


def test_a_postprocess_reads_what_its_backward_left() -> None:
    """The order of dq_accum's columns."""
    split = {
        kernel: {
            (v.arch, v.dtype, v.head_dim, v.head_dim_v): v.tiles.split
            for v in VARIANTS
            if v.kernel is kernel
        }
        for kernel in (Kernel.backward, Kernel.backward_postprocess)
    }
    assert split[Kernel.backward] == split[Kernel.backward_postprocess]


def test_an_architecture_is_served_when_it_has_every_kernel(monkeypatch) -> None:
    """Arch-free keys are chosen when lowering: one that only one chip has fails on others."""
    assert served_arches() == (Arch.sm90a,)
    hopper = [v for v in VARIANTS if v.arch is Arch.sm90a]
    others = tuple(dataclasses.replace(v, arch=Arch.sm100a) for v in hopper)
    monkeypatch.setattr(_variants, "VARIANTS", (*hopper, *others))
    assert served_arches() == (Arch.sm90a, Arch.sm100a)
    monkeypatch.setattr(_variants, "VARIANTS", (*hopper, *others[1:]))
    assert served_arches() == (Arch.sm90a,)


def test_a_kernel_is_whole_on_each_architecture() -> None:
    """In each dtype that it has there."""
    held: dict[tuple[Kernel, Arch, DType], set[str]] = {}
    for v in VARIANTS:
        held.setdefault((v.kernel, v.arch, v.dtype), set()).add(v.key)
    for (kernel, _, dtype), keys in held.items():
        assert keys == held[kernel, Arch.sm90a, dtype]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_tiles_fit_the_workspaces(variant: Variant) -> None:
    assert variant.tiles.tile_m > 0
    if variant.kernel in BACKWARD:
        # R and E don't know a variant's tiles, so a tile must never cross their padding.
        assert ROW_MULTIPLE % variant.tiles.tile_m == 0
    if variant.kernel in (Kernel.forward, Kernel.backward):
        # Blocks say what an interval tells of a tile, so a tile of queries or, in a backward, of
        # keys has to be whole blocks.
        assert variant.tiles.tile_m % BLOCK == 0
        assert variant.kernel is Kernel.forward or variant.tiles.tile_n % BLOCK == 0
    assert variant.static_dims["E"] % HEAD_DIM_MULTIPLE == 0
    assert variant.static_dims["E"] >= variant.head_dim


def test_bounds_fit_int32() -> None:
    """The band is clamped to [-T, S], and kernels add a row or column index to it."""
    assert 2 * MAX_DIMENSION < 2**31
    assert round_up(MAX_DIMENSION, ROW_MULTIPLE) < 2**31


@pytest.mark.parametrize("row", SIGNATURES, ids=lambda row: "-".join((row[0], *row[1])))
def test_signatures(row: tuple[Kernel, tuple[Feature, ...]]) -> None:
    (kernel, features), signature = row, SIGNATURES[row]
    assert signature == _variants.signature(kernel, features)
    operands = {buffer.name: buffer for buffer in signature.operands}
    results = {buffer.name: buffer for buffer in signature.results}
    assert len(operands) == len(signature.operands) and len(results) == len(signature.results)
    for i, j in signature.aliases.items():
        assert signature.operands[i] == signature.results[j]
    assert {signature.operands[i].name for i in signature.aliases} == set(operands) & set(results)
    assert len({buffer.name for buffer in signature.buffers}) == len(signature.buffers)
    # Batching folds a mapped axis into the leading dimension of every buffer that isn't the
    # kernel's own.
    assert all(buffer.dims[0] in "BZ" for buffer in signature.buffers if not buffer.zeroed)
    # An operand holds something already.
    assert not any(buffer.zeroed for buffer in signature.operands)
    assert all(set(buffer.dims) <= set("BTSNKDVREMJWZU") for buffer in signature.buffers)
    interval = {"kv_start", "kv_end", "key_range", "query_range"} & set(operands)
    assert bool(interval) == (Feature.interval in features)
    assert all(scalar.kind in ("f32", "i32", "sms") for scalar in signature.scalars)
    assert str(kernel) in target_name(kernel)


def test_one_name_means_one_buffer_in_every_signature() -> None:
    seen = {}
    for signature in SIGNATURES.values():
        for buffer in signature.buffers:
            assert seen.setdefault(buffer.name, buffer) == buffer


def test_target_names_are_versioned_and_unique() -> None:
    names = {target_name(kernel) for kernel in Kernel}
    assert len(names) == len(Kernel) == len({kernel for kernel, _ in SIGNATURES})
    assert all(re.fullmatch(r"fa4_jax_[a-z_]+_v\d+", name) for name in names)


def test_built_head_dims_are_the_rows() -> None:
    pairs = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    assert built_head_dims(Kernel.forward, DType.bf16) == pairs
    assert built_head_dims(Kernel.forward, DType.f32) == ()


def test_architectures_name_their_target() -> None:
    assert [arch.cuda_target for arch in Arch] == ["sm_90a", "sm_100a"]
    assert len({arch.compute_capability for arch in Arch}) == len(Arch)


def test_support_table_lists_what_is_built(monkeypatch) -> None:
    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]

    pairs = "64, 96, 128, 192/128, 192, 256"
    assert cells(_variants.support_table()) == [
        ["sm_90a", "9.0", "bfloat16", pairs, pairs],
        ["sm_90a", "9.0", "float16", pairs, pairs],
    ]
    without = tuple(v for v in VARIANTS if (v.kernel, v.head_dim) != (Kernel.backward, 128))
    monkeypatch.setattr(_variants, "VARIANTS", without)
    rest = "64, 96, 192/128, 192, 256"
    assert [row[4] for row in cells(_variants.support_table())] == [rest, rest]
