# SPDX-License-Identifier: Apache-2.0
"""Translation of arithmetic, logic, moves and conversions (PTX ISA: Integer Arithmetic,
Floating Point, Comparison and Selection, Logic and Shift, Data Movement and Conversion)."""

from __future__ import annotations

from .codegen import BITS, DTYPES, Emitter, items
from .errors import UnsupportedInstruction
from .instruction_set import Unit, instruction
from .ptx import Immediate, Instruction, Operand, Pair, Register, Sink, Vector

Modifiers = dict[str, str]

_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=",
}  # fmt: skip
_OPPOSITES = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def _whole(operands: tuple[Operand, ...], expression: str, dtype: str) -> str:
    """An expression made a whole array where all its operands are constants."""
    if any(isinstance(operand, Register) for operand in operands):
        return expression
    return f"np.full(LANES, {expression}, {dtype})"


# Floating point -----------------------------------------------------------------------------------


def _float_arithmetic(e: Emitter, op: Instruction, m: Modifiers, dtype: str) -> None:
    base = op.opcode.partition(".")[0]
    destination, *sources = op.operands
    values = [e.value(x, dtype) for x in sources]
    if m.get("ftz"):
        values = [f"flush({x})" for x in values]
    directed = m["rounding"] in ("rz", "rm", "rp")
    if base == "sub" and directed:
        base, values[1] = "add", f"(-{values[1]})"
    if directed:
        result = f"{base}_directed({', '.join(values)}, {m['rounding']!r})"
    elif base == "fma":
        result = f"fma({', '.join(values)})"
    else:
        result = {"add": " + ", "sub": " - ", "mul": " * "}[base].join(values)
    if m.get("ftz"):
        result = f"flush({result})"
    if m.get("sat"):
        result = f"saturate({result})"
    e.define(destination, dtype, _whole(tuple(sources), result, "f32"))


@instruction(
    "add{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}{sat=.sat}.f32",
    "sub{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}{sat=.sat}.f32",
    "mul{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}{sat=.sat}.f32",
    "fma(rounding=.rn|.rz|.rm|.rp){ftz=.ftz}{sat=.sat}.f32",
    unit=Unit.fma,
)
def float_arithmetic(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Whether ptxas contracts `mul` and `add` to fma is not modelled."""
    _float_arithmetic(e, op, m, "f32")


@instruction(
    "add{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}.f32x2",
    "sub{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}.f32x2",
    "mul{rounding=.rn|.rz|.rm|.rp}{ftz=.ftz}.f32x2",
    "fma(rounding=.rn|.rz|.rm|.rp){ftz=.ftz}.f32x2",
    unit=Unit.fma,
)
def packed_arithmetic(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Two float32s in a 64-bit register, sm_100 and later."""
    if not all(isinstance(x, Register) for x in op.operands):
        raise UnsupportedInstruction("constant operand of f32x2")
    _float_arithmetic(e, op, m, "f32x2")


@instruction("fma.rn.f32(narrow=.bf16|.f16)", "add.f32(narrow=.bf16|.f16)", unit=Unit.fma)
def mixed_precision(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """16-bit operands, float32 accumulation. `add` widens its first operand only."""
    destination, *sources = op.operands
    wide = [f"from_{m['narrow']}({e.lanes(x, 'u16')})" for x in sources[:-1]]
    last = e.value(sources[-1], "f32")
    joined = ", ".join([*wide, last])
    e.define(destination, "f32", f"fma({joined})" if len(wide) == 2 else f"{wide[0]} + {last}")


@instruction(
    "max{ftz=.ftz}{nan=.NaN}.f32", "min{ftz=.ftz}{nan=.NaN}.f32", unit=Unit.fma
)  # fmt: skip
def float_extremum(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """max and min: three sources are allowed on sm_100 and later."""
    function = "maximum" if op.opcode.startswith("max") else "minimum"
    destination, *sources = op.operands
    values = [e.value(x, "f32") for x in sources]
    if m["ftz"]:
        values = [f"flush({x})" for x in values]
    result = values[0]
    for value in values[1:]:
        result = f"{function}({result}, {value}, {bool(m['nan'])})"
    e.define(destination, "f32", _whole(tuple(sources), result, "f32"))


@instruction("neg{ftz=.ftz}.f32", "abs{ftz=.ftz}.f32", unit=Unit.fma)
def float_sign(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Floating Point Instructions: neg, abs."""
    value = e.lanes(op.operands[1], "f32")
    value = f"flush({value})" if m["ftz"] else value
    e.define(op.operands[0], "f32", f"np.abs({value})" if op.opcode[0] == "a" else f"-{value}")


@instruction("copysign.f32", unit=Unit.fma)
def copy_sign(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """copysign: the sign of the first source on the magnitude of the second."""
    sign, magnitude = (e.lanes(x, "f32") for x in op.operands[1:])
    e.define(op.operands[0], "f32", f"np.copysign({magnitude}, {sign})")


@instruction(
    "ex2.approx{ftz=.ftz}.f32",
    "lg2.approx{ftz=.ftz}.f32",
    "rcp.approx{ftz=.ftz}.f32",
    "rsqrt.approx{ftz=.ftz}.f32",
    "sqrt.approx{ftz=.ftz}.f32",
    unit=Unit.mufu,
)
def transcendental(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Floating Point Instructions: ex2, lg2, rcp, rsqrt, sqrt; see `alu`."""
    function = op.opcode.partition(".")[0]
    value = e.lanes(op.operands[1], "f32")
    e.define(op.operands[0], "f32", f"{function}({value}, {bool(m['ftz'])})")


@instruction("tanh.approx.f32", "sin.approx{.ftz}.f32", "cos.approx{.ftz}.f32", unit=Unit.mufu)
def trigonometric(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Results near 0 are absolute-error bounded, so `.ftz` is
    moot."""
    function = op.opcode.partition(".")[0]
    e.define(op.operands[0], "f32", f"np.{function}({e.lanes(op.operands[1], 'f32')})")


@instruction("rcp.rn{ftz=.ftz}.f32", "sqrt.rn{ftz=.ftz}.f32", unit=Unit.mufu)
def rounded_function(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Correctly rounded; a sequence of instructions on the hardware."""
    function = "rcp_rn" if op.opcode.startswith("rcp") else "sqrt"
    value = e.lanes(op.operands[1], "f32")
    e.define(op.operands[0], "f32", f"{function}({value}, {bool(m['ftz'])})")


@instruction("div(mode=.rn|.full|.approx){ftz=.ftz}.f32", unit=Unit.mufu)
def float_divide(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """`.full` and `.approx` are at least as good as asked for."""
    a, b = (e.value(x, "f32") for x in op.operands[1:])
    result = f"flush(flush({a}) / flush({b}))" if m["ftz"] else f"{a} / {b}"
    e.define(op.operands[0], "f32", _whole(op.operands[1:], result, "f32"))


# Integers -----------------------------------------------------------------------------------------


@instruction(
    "add(type=.s16|.u16|.s32|.u32|.s64|.u64)", "sub(type=.s16|.u16|.s32|.u32|.s64|.u64)",
    unit=Unit.integer,
)  # fmt: skip
def integer_sum(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """add and sub: modulo the width; no `.sat`."""
    dtype = DTYPES[m["type"]]
    symbol = "+" if op.opcode.startswith("add") else "-"
    a, b = (e.value(x, dtype) for x in op.operands[1:])
    e.define(op.operands[0], dtype, _whole(op.operands[1:], f"{a} {symbol} {b}", dtype))


@instruction(
    "mul(mode=.lo)(type=.s16|.u16|.s32|.u32|.s64|.u64)",
    "mul(mode=.hi)(type=.s32|.u32)",
    "mul(mode=.wide)(type=.s16|.u16|.s32|.u32)",
    "mad(mode=.lo)(type=.s16|.u16|.s32|.u32|.s64|.u64)",
    "mad(mode=.hi)(type=.s32|.u32)",
    "mad(mode=.wide)(type=.s16|.u16|.s32|.u32)",
    unit=Unit.integer,
)
def integer_product(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mul and mad: the low half, the high half, or both in a register twice as wide."""
    dtype = result = DTYPES[m["type"]]
    a, b = e.lanes(op.operands[1], dtype), e.value(op.operands[2], dtype)
    if m["mode"] == "lo":
        product = f"{a} * {b}"
    elif m["mode"] == "hi":
        product = f"mul_high({a}, {b})"
    else:
        result = f"{dtype[0]}{2 * BITS[dtype]}"
        product = f"np.multiply({a}, {b}, dtype={result})"
    if op.opcode.startswith("mad"):
        product = f"({product}) + {e.value(op.operands[3], result)}"
    e.define(op.operands[0], result, product)


@instruction("div(type=.s16|.u16|.s32|.u32|.s64|.u64)", "rem(type=.s16|.u16|.s32|.u32|.s64|.u64)",
             unit=Unit.integer)  # fmt: skip
def integer_quotient(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Integer Arithmetic Instructions: div, rem; see `alu`."""
    dtype = DTYPES[m["type"]]
    function = "divide" if op.opcode.startswith("div") else "remainder"
    a, b = e.lanes(op.operands[1], dtype), e.value(op.operands[2], dtype)
    e.define(op.operands[0], dtype, f"{function}({a}, {b})")


@instruction(
    "max{relu=.relu}(type=.s32)", "min{relu=.relu}(type=.s32)",
    "max(type=.s16|.u16|.u32|.s64|.u64)", "min(type=.s16|.u16|.u32|.s64|.u64)",
    unit=Unit.integer,
)  # fmt: skip
def integer_extremum(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """`.relu` turns a negative result into 0."""
    dtype = DTYPES[m["type"]]
    function = "np.maximum" if op.opcode.startswith("max") else "np.minimum"
    result = f"{function}({e.lanes(op.operands[1], dtype)}, {e.value(op.operands[2], dtype)})"
    if m.get("relu"):
        result = f"np.maximum({result}, {dtype}(0))"
    e.define(op.operands[0], dtype, result)


@instruction("neg(type=.s16|.s32|.s64)", "abs(type=.s16|.s32|.s64)", unit=Unit.integer)
def integer_sign(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Integer Arithmetic Instructions: neg, abs."""
    dtype = DTYPES[m["type"]]
    value = e.lanes(op.operands[1], dtype)
    e.define(op.operands[0], dtype, f"np.abs({value})" if op.opcode[0] == "a" else f"-{value}")


@instruction(
    "and(type=.pred|.b16|.b32|.b64)",
    "or(type=.pred|.b16|.b32|.b64)",
    "xor(type=.pred|.b16|.b32|.b64)",
    unit=Unit.integer,
)  # fmt: skip
def bitwise(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Logic and Shift Instructions: and, or, xor."""
    dtype = DTYPES[m["type"]]
    symbol = {"and": "&", "or": "|", "xor": "^"}[op.opcode.partition(".")[0]]
    a, b = e.lanes(op.operands[1], dtype), e.value(op.operands[2], dtype)
    e.define(op.operands[0], dtype, f"{a} {symbol} {b}")


@instruction("not(type=.pred|.b16|.b32|.b64)", unit=Unit.integer)
def complement(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Logic and Shift Instructions: not."""
    dtype = DTYPES[m["type"]]
    e.define(op.operands[0], dtype, f"~{e.lanes(op.operands[1], dtype)}")


@instruction(
    "shl(type=.b16|.b32|.b64)", "shr(type=.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64)",
    unit=Unit.integer,
)  # fmt: skip
def shift(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """shl and shr: the count is 32 bits wide, whatever the type."""
    dtype = DTYPES[m["type"]]
    value, count = e.lanes(op.operands[1], dtype), op.operands[2]
    left = op.opcode.startswith("shl")
    if isinstance(count, Immediate) and 0 <= count.value < BITS[dtype]:
        expression = f"{value} {'<<' if left else '>>'} {e.value(count, dtype)}"
    else:
        function = "shift_left" if left else "shift_right"
        expression = f"{function}({value}, {e.lanes(count, 'u32')}, {BITS[dtype]})"
    e.define(op.operands[0], dtype, expression)


@instruction("shf(direction=.l|.r)(mode=.wrap|.clamp).b32", unit=Unit.integer)
def funnel(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Logic and Shift Instructions: shf."""
    low, high, count = (e.lanes(x, "u32") for x in op.operands[1:])
    left, wrap = m["direction"] == "l", m["mode"] == "wrap"
    e.define(op.operands[0], "u32", f"funnel_shift({low}, {high}, {count}, {left}, {wrap})")


@instruction("popc.b32", "clz.b32", "brev.b32", unit=Unit.integer)
def bit_count(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Integer Arithmetic Instructions: popc, clz, brev."""
    functions = {"popc": "population", "clz": "leading_zeros", "brev": "reverse_bits"}
    function = functions[op.opcode.partition(".")[0]]
    e.define(op.operands[0], "u32", f"{function}({e.lanes(op.operands[1], 'u32')})")


@instruction("lop3.b32", unit=Unit.integer)
def three_input_logic(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Logic and Shift Instructions: lop3."""
    a, b, c = (e.lanes(x, "u32") for x in op.operands[1:4])
    table = op.operands[4]
    assert isinstance(table, Immediate)
    e.define(op.operands[0], "u32", f"lop3({a}, {b}, {c}, {table.value})")


@instruction("prmt.b32", unit=Unit.integer)
def byte_permute(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """prmt: the mode without a name."""
    a, b, selector = (e.lanes(x, "u32") for x in op.operands[1:])
    e.define(op.operands[0], "u32", f"permute_bytes({a}, {b}, {selector})")


@instruction("bfe(type=.u32|.s32)", unit=Unit.integer)
def bit_field(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Integer Arithmetic Instructions: bfe."""
    dtype = DTYPES[m["type"]]
    start, length = (e.lanes(x, "u32") for x in op.operands[2:])
    e.define(
        op.operands[0], dtype, f"extract_bits({e.lanes(op.operands[1], dtype)}, {start}, {length})"
    )


@instruction("bfi.b32", unit=Unit.integer)
def bit_insert(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Integer Arithmetic Instructions: bfi."""
    values = ", ".join(e.lanes(x, "u32") for x in op.operands[1:])
    e.define(op.operands[0], "u32", f"insert_bits({values})")


# Comparisons, moves, conversions ------------------------------------------------------------------


@instruction(
    "setp(compare=.eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan)"
    "{combine=.and|.or|.xor}{ftz=.ftz}(type=.f32)",
    "setp(compare=.eq|.ne){combine=.and|.or|.xor}(type=.b16|.b32|.b64)",
    "setp(compare=.eq|.ne|.lt|.le|.gt|.ge){combine=.and|.or|.xor}(type=.s16|.s32|.s64)",
    "setp(compare=.eq|.ne|.lt|.le|.gt|.ge|.lo|.ls|.hi|.hs){combine=.and|.or|.xor}(type=.u16|.u32|.u64)",
    unit=Unit.integer,
)
def set_predicate(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """`q` of `p|q` gets the complement; an unordered comparison is true for NaN."""
    dtype = DTYPES[m["type"]]
    destination, *sources = op.operands
    a, b = e.lanes(sources[0], dtype), e.value(sources[1], dtype)
    if m.get("ftz"):
        a, b = f"flush({a})", f"flush({b})"
    condition = _comparison(m["compare"], a, b, dtype)
    negation = f"~({condition})"
    if m["combine"]:
        symbol = {"and": "&", "or": "|", "xor": "^"}[m["combine"]]
        other = e.lanes(sources[2], "pred")
        condition, negation = f"({condition}) {symbol} {other}", f"({negation}) {symbol} {other}"
    if isinstance(destination, Pair):
        name = e.temporary()
        e.emit(f"{name} = {negation}")
        e.define(destination.first, "pred", condition)
        e.define(destination.second, "pred", name)
    else:
        e.define(destination, "pred", condition)


def _comparison(compare: str, a: str, b: str, dtype: str) -> str:
    if dtype == "f32":
        if compare in _OPPOSITES:
            return f"~({a} {_OPPOSITES[compare]} {b})"
        if compare in ("ne", "equ"):
            return f"{'~' if compare == 'equ' else ''}(({a} < {b}) | ({a} > {b}))"
        if compare in ("num", "nan"):
            return f"{'~' if compare == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
        if compare == "neu":
            return f"{a} != {b}"
    return f"{a} {_COMPARISONS[compare]} {b}"


@instruction(
    "selp(type=.b16|.u16|.s16|.b32|.u32|.s32|.f32|.b64|.u64|.s64)", unit=Unit.integer
)  # fmt: skip
def select(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, Comparison and Selection Instructions: selp."""
    dtype = DTYPES[m["type"]]
    a, b = (e.value(x, dtype) for x in op.operands[1:3])
    e.define(op.operands[0], dtype, f"np.where({e.lanes(op.operands[3], 'pred')}, {a}, {b})")


@instruction(
    "mov(type=.pred|.b16|.u16|.s16|.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64)", unit=Unit.move
)  # fmt: skip
def move(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mov: also packs and unpacks vectors, and takes the address of a variable."""
    destination, source = op.operands
    dtype = DTYPES[m["type"]]
    if isinstance(destination, Vector):
        parts = destination.items
        part = f"u{BITS[dtype] // len(parts)}"
        name = e.temporary()
        e.emit(f"{name} = {e.lanes(source, dtype)}.view({part}).reshape(LANES, {len(parts)})")
        for index, item in enumerate(parts):
            if not isinstance(item, Sink):
                e.define(item, part, f"np.ascontiguousarray({name}[:, {index}])")
    elif isinstance(source, Vector):
        part = f"u{BITS[dtype] // len(source.items)}"
        values = ", ".join(e.value(item, part) for item in source.items)
        e.define(destination, dtype, f"pack(({values},), {part}, {dtype})")
    elif isinstance(source, Register):
        e.define(destination, e.home(source), e.value(source, e.home(source)))
    else:
        e.define(destination, dtype, e.lanes(source, dtype))


@instruction(
    "cvt(rounding=.rn|.rz)(to=.bf16x2|.f16x2).f32", "cvt(rounding=.rn|.rz)(to=.bf16|.f16).f32",
    unit=Unit.convert,
)  # fmt: skip
def narrow_float(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cvt to 16 bits: the first source of a pair goes to the upper half; no `.relu`, no
    `.satfinite`."""
    kind = m["to"].removesuffix("x2")
    values = [f"{kind}_bits({e.lanes(x, 'f32')}, {m['rounding']!r})" for x in op.operands[1:]]
    if m["to"].endswith("x2"):
        e.define(op.operands[0], "u32", f"({values[0]} << u32(16)) | {values[1]}")
    else:
        e.define(op.operands[0], "u16", f"{values[0]}.astype(u16)")


@instruction("cvt.f32(source=.bf16|.f16)", unit=Unit.convert)
def widen_float(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Exact."""
    e.define(op.operands[0], "f32", f"from_{m['source']}({e.lanes(op.operands[1], 'u16')})")


@instruction("cvt.rn.f32(source=.s32|.u32|.s64|.u64|.s16|.u16)", unit=Unit.convert)
def integer_to_float(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Rounded to nearest."""
    e.define(op.operands[0], "f32", f"{e.lanes(op.operands[1], DTYPES[m['source']])}.astype(f32)")


@instruction(
    "cvt(rounding=.rni|.rzi|.rmi|.rpi){ftz=.ftz}(to=.s32|.u32|.s64|.u64).f32", unit=Unit.convert
)  # fmt: skip
def float_to_integer(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Out of range saturates, NaN becomes 0."""
    value = e.lanes(op.operands[1], "f32")
    value = f"flush({value})" if m["ftz"] else value
    dtype = DTYPES[m["to"]]
    e.define(op.operands[0], dtype, f"to_integer({value}, {m['rounding']!r}, {dtype})")


@instruction(
    "cvt(to=.s8|.u8|.s16|.u16|.s32|.u32|.s64|.u64)(source=.s8|.u8|.s16|.u16|.s32|.u32|.s64|.u64)",
    unit=Unit.convert,
)
def integer_to_integer(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cvt between integers: the source is read at its own width from a register that may be wider;
    the result, truncated or extended to the destination type, is extended to its register by its
    signedness."""
    destination, source = op.operands
    narrow = DTYPES[m["source"]]
    register = e.home(source) if isinstance(source, Register) else narrow
    wide = {"f32": "u32"}.get(register, register)
    value = e.lanes(source, wide)
    if BITS[narrow] == BITS[wide]:
        value = f"{value}.view({narrow})"
    else:
        value = f"{value}.astype({narrow})"
    to = DTYPES[m["to"]]
    width = BITS[e.home(destination)] if isinstance(destination, Register) else BITS[to]
    if BITS[to] < width:
        value = f"{value}.astype({to})"
    target = f"{to[0]}{width}"
    e.define(destination, target, f"{value}.astype({target})")


@instruction(
    "cvta{.to}{.shared|.shared::cta|.shared::cluster|.global|.param}.u64", unit=Unit.move
)  # fmt: skip
def convert_address(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Generic addresses are the addresses of the state space: the spaces don't
    overlap."""
    e.define(op.operands[0], "u64", e.lanes(op.operands[1], "u64"))


@instruction("mapa{.shared::cluster}(type=.u32|.u64)", unit=Unit.integer)
def map_address(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mapa: the same place in the shared memory of another CTA of the cluster."""
    dtype = DTYPES[m["type"]]
    address, rank = e.lanes(op.operands[1], dtype), e.lanes(op.operands[2], "u32")
    e.define(op.operands[0], dtype, f"map_to_rank({address}, {rank})")


# Lanes --------------------------------------------------------------------------------------------


@instruction("shfl.sync(mode=.up|.down|.bfly|.idx).b32", unit=Unit.shuffle, convergent=True)
def shuffle(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Lanes outside the member mask are not expected to execute it."""
    destination, value, offset, clamp = op.operands[:4]
    source = e.lanes(value, "u32")
    if (
        isinstance(offset, Immediate)
        and isinstance(clamp, Immediate)
        and not isinstance(destination, Pair)
    ):
        table = e.constant(f"shuffle_sources({m['mode']!r}, {offset.value}, {clamp.value})[0]")
        e.define(destination, "u32", f"{source}[{table}]")
        return
    result, inside = e.temporary(), e.temporary()
    arguments = f"{source}, {m['mode']!r}, {e.lanes(offset, 'u32')}, {e.lanes(clamp, 'u32')}"
    e.emit(f"{result}, {inside} = shuffle({arguments})")
    if isinstance(destination, Pair):
        e.define(destination.first, "u32", result)
        e.define(destination.second, "pred", inside)
    else:
        e.define(destination, "u32", result)


@instruction(
    "vote.sync(mode=.ballot).b32",
    "vote.sync(mode=.all|.any|.uni).pred",
    unit=Unit.integer,
    convergent=True,
)
def vote(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, vote.sync."""
    predicate = e.lanes(op.operands[1], "pred")
    if m["mode"] == "ballot":
        e.define(op.operands[0], "u32", f"ballot({predicate}, {e.active})")
    else:
        e.define(op.operands[0], "pred", f"vote({m['mode']!r}, {predicate}, {e.active})")


@instruction("redux.sync(mode=.add|.min|.max)(type=.u32|.s32)",
             "redux.sync(mode=.and|.or|.xor)(type=.b32)",
             unit=Unit.integer, convergent=True)  # fmt: skip
def reduce_warp(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """PTX ISA, redux.sync."""
    dtype = DTYPES[m["type"]]
    value = e.lanes(op.operands[1], dtype)
    e.define(op.operands[0], dtype, f"reduce_lanes({m['mode']!r}, {value}, {e.active})")


@instruction("elect.sync", unit=Unit.integer, convergent=True)
def elect(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """elect.sync: one lane of the warp, the lowest active one here, gets true."""
    destination = op.operands[0]
    assert isinstance(destination, Pair)
    if not isinstance(destination.first, Sink):
        e.define(destination.first, "u32", f"np.full(LANES, elected_lane({e.active}), u32)")
    if not isinstance(destination.second, Sink):
        e.define(destination.second, "pred", f"LANE == elected_lane({e.active})")


def operand_list(e: Emitter, operand: Operand, dtype: str) -> str:
    """A vector operand as a Python tuple of arrays."""
    return "(" + "".join(f"{e.lanes(x, dtype)}, " for x in items(operand)) + ")"
