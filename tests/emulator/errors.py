# SPDX-License-Identifier: Apache-2.0
"""What the emulator raises. Every message names the kernel, CTA, warp, role and PTX line it can."""

from __future__ import annotations


class EmulatorError(Exception):
    """A kernel did something that the hardware forbids, or that this emulator can't run."""


class UnsupportedInstruction(EmulatorError):
    """An opcode, modifier or operand form that no handler declares."""


class Deadlock(EmulatorError):
    """No warp can run and no asynchronous operation is pending, of a cluster or, where CTAs
    communicate, of all that are resident."""


class Livelock(EmulatorError):
    """A warp ran more blocks than any kernel needs; most likely it polls with weak loads."""


class OutOfBounds(EmulatorError):
    """An access outside a buffer, shared memory or the allocated columns of tensor memory."""


class Misaligned(EmulatorError):
    """An address or descriptor that isn't aligned as the instruction demands."""


class Poison(EmulatorError):
    """A read of shared or tensor memory that nothing wrote."""


class BarrierError(EmulatorError):
    """An arrival too many, a wrong transaction count, or a barrier that nobody initialised."""


class ProtocolError(EmulatorError):
    """An instruction against its own rules: allocation, register budget, divergence, pending
    work."""


class RaceError(EmulatorError):
    """The happens-before check found accesses that nothing orders; the message lists them."""
