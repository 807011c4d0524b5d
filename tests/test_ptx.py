"""tests/ptx.py, on kernels of a few lines: what it has to find, and what it has to let pass."""

from __future__ import annotations

import pytest

from tests import ptx

WAIT = "griddepcontrol.wait"


def touched(body: str) -> list[str]:
    (kernel,) = ptx.kernels(f".visible .entry _Z1k(\n\t.param .u64 p\n)\n.maxntid 256\n{{\n{body}\n}}\n").values()
    return [statement.opcode for statement in kernel.touched_before(WAIT)]


@pytest.mark.parametrize(
    "body",
    [
        "ld.param.u64 %rd1, [p];\n// begin inline asm\ngriddepcontrol.wait;\n// end inline asm\nld.global.f32 %f1, [%rd1];\nret;",
        # both branches wait
        "@%p1 bra $L1;\ngriddepcontrol.wait;\nst.global.f32 [%rd1], %f1;\nret;\n$L1:\ngriddepcontrol.wait;\nret;",
        # one leaves
        "@%p1 bra $L1;\ngriddepcontrol.wait;\n$L1:\nret;",
        # memory that is the block's own, in a scope of its own
        "{\n.reg .b32 %t;\nst.shared.v4.f32 [%r1], {%f1, %f2, %f3, %f4};\n}\nld.const.u32 %r2, [c];\ngriddepcontrol.wait;\nret;",
        "// ld.global.f32 %f1, [%rd1];\n/* st.global\n.f32 */ griddepcontrol.wait;\nret;",
    ],
)
def test_what_may_come_before(body):
    assert touched(body) == []


@pytest.mark.parametrize(
    "body, found",
    [
        ("ld.global.nc.f32 %f1, [%rd1];\ngriddepcontrol.wait;\nret;", "ld.global.nc.f32"),
        ("ld.f32 %f1, [%rd1];\ngriddepcontrol.wait;\nret;", "ld.f32"),  # generic: it may be global
        ("@%p1 st.global.v2.u32 [%rd1], {%r1, %r2};\ngriddepcontrol.wait;\nret;", "st.global.v2.u32"),
        ("atom.global.inc.u32 %r1, [%rd1], %r2;\ngriddepcontrol.wait;\nret;", "atom.global.inc.u32"),
        ("red.global.add.u32 [%rd1], 1;\ngriddepcontrol.wait;\nret;", "red.global.add.u32"),
        ("cp.async.cg.global [%r1], [%rd1], 16;\ngriddepcontrol.wait;\nret;", "cp.async.cg.global"),
        ("prefetch.global.L2 [%rd1];\ngriddepcontrol.wait;\nret;", "prefetch.global.L2"),
        ("{ call.uni (r), f, (a); }\ngriddepcontrol.wait;\nret;", "call.uni"),
        # a branch around the wait
        ("@%p1 bra $L1;\ngriddepcontrol.wait;\n$L1:\nld.global.f32 %f1, [%rd1];\nret;", "ld.global.f32"),
        # one that comes back
        ("bra.uni $L2;\n$L1:\ngriddepcontrol.wait;\nret;\n$L2:\nld.global.f32 %f1, [%rd1];\nbra $L1;", "ld.global.f32"),
        # a wait that some threads skip
        ("@%p1 griddepcontrol.wait;\nld.global.f32 %f1, [%rd1];\nret;", "ld.global.f32"),
        # none
        ("st.global.f32 [%rd1], %f1;\nret;", "st.global.f32"),
    ],
)
def test_what_may_not(body, found):
    assert found in touched(body)


def test_every_kernel_is_seen():
    text = "\n".join(f".visible .entry {name}()\n{{\n\tret;\n}}\n" for name in ("a", "b$1", "c"))
    assert {name: kernel.opcodes() for name, kernel in ptx.kernels(text).items()} == dict.fromkeys(
        ("a", "b$1", "c"), ["ret"]
    )
