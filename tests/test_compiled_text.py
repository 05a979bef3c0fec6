# SPDX-License-Identifier: Apache-2.0
"""What is read from the text of a compiled program: loops multiplied, collectives by kind."""

# ruff: noqa: E501 (a recorded text)

import pytest

from vlm_jax.__main__ import main
from vlm_jax.aot import counted, hlo, report, topology
from vlm_jax.cost.chips import CHIPS

# In the form of libtpu 0.0.42: a loop of 3 with an asynchronous gather in three pieces and a
# product, a windowed loop of 8 in steps of 2, a combined reduction behind them.
TEXT = """\
HloModule jit_step, is_scheduled=true

%wide.condition (p: (s32[], bf16[3,8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%async_collective_fusion.1 (p0: bf16[8,32], p1: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={1}, metadata={op_name="jit(step)/jvp(llm)/mlp/dot_general"}
  ROOT %custom-call.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%product (a: bf16[8,128], b: bf16[128,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(llm)/mlp/dot_general"}
}

%body (q: (s32[], bf16[3,8,128])) -> (s32[], bf16[3,8,128]) {
  %q = (s32[]{:T(128)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%q), index=0
  %one = s32[]{:T(128)} constant(1)
  %add.1 = s32[]{:T(128)} add(%counter, %one)
  %stack = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %x = bf16[8,32]{1,0:T(8,128)(2,1)} constant({...})
  %w = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %start = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %step.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %done = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%done, %w), kind=kOutput, calls=%product, metadata={op_name="jit(step)/jvp(llm)/mlp/dot_general"}, backend_config={"estimated_cycles":"100"}
  %dynamic-update-slice.1 = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%stack, %fusion.1, %counter)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%add.1, %dynamic-update-slice.1)
}

%all-reduce-scatter.1 (g: f32[6,128]) -> f32[3,128] {
  %g = f32[6,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[6,128]{1,0:T(8,128)} all-reduce(%g), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, to_apply=%sum
  ROOT %dynamic-slice.1 = f32[3,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.2)
}

%windowed.condition (p: (f32[4], u32[])) -> pred[] {
  %constant.2 = u32[]{:T(128)} constant(8)
  %p.2 = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  ROOT %compare.2 = pred[]{:T(512)} compare(%get-tuple-element.2, %constant.2), direction=LT
}

%windowed.body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %p.3 = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %value = f32[4]{0:T(128)} get-tuple-element(%p.3), index=0
  %at = u32[]{:T(128)} get-tuple-element(%p.3), index=1
  %two = u32[]{:T(128)} constant(2)
  %add.2 = u32[]{:T(128)} add(%at, %two)
  %collective-permute-start = (f32[4]{0:T(128)}, f32[4]{0:T(128)}, u32[]{:S(2)}) collective-permute-start(%value), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = f32[4]{0:T(128)} collective-permute-done(%collective-permute-start)
  ROOT %tuple.2 = (f32[4]{0:T(128)}, u32[]{:T(128)}) tuple(%collective-permute-done, %add.2)
}

ENTRY %main (p: bf16[8,32]) -> f32[6,128] {
  %arguments = (s32[]{:T(128)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) constant({...})
  %while.1 = (s32[]{:T(128)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) while(%arguments), condition=%wide.condition, body=%body, metadata={op_name="jit(step)/jvp(llm)/while"}
  %start.2 = (f32[4]{0:T(128)}, u32[]{:T(128)}) constant({...})
  %while.2 = (f32[4]{0:T(128)}, u32[]{:T(128)}) while(%start.2), condition=%windowed.condition, body=%windowed.body
  %gradient = f32[6,128]{1,0:T(8,128)} constant({...})
  %scale = f32[128]{0:T(128)} constant({...})
  %all-reduce.1 = (f32[6,128]{1,0:T(8,128)}, f32[128]{0:T(128)}) all-reduce(%gradient, /*index=1*/%scale), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum, metadata={op_name="jit(step)/optimizer/add"}
  %kernel = f32[6,128]{1,0:T(8,128)} custom-call(%gradient), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"50","transcendentals":"1","bytes_accessed":"60"}}}
  %fusion.2 = f32[3,128]{1,0:T(8,128)} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %copy.1 = f32[6,128]{1,0:T(8,128)} copy(%gradient), backend_config={"estimated_cycles":"7"}
}
"""


@pytest.fixture(scope="module")
def facts():
    return counted.facts(TEXT, report.part_of)


def test_a_loop_counts_as_often_as_it_runs(facts):
    assert facts.flops == 3 * 2 * 8 * 128 * 128
    assert facts.cycles == {"mlp": 300, "other": 7}
    assert facts.unread_loops == ()


def test_collectives_are_counted_by_kind_once_each(facts):
    found = {(c.kind, c.asynchronous, c.times): (c.bytes, c.group) for c in facts.collectives}
    assert found == {
        ("all-gather", True, 3): (8 * 128 * 2, 4),  # in three pieces, one tensor
        ("collective-permute", True, 4): (16, 1),  # 8 in steps of 2
        ("reduce-scatter", False, 1): (6 * 128 * 4, 2),  # as the compiler writes it
        ("all-reduce", False, 1): (6 * 128 * 4 + 128 * 4, 8),
    }
    sent = {c.kind: c.sent for c in facts.collectives}
    assert sent["all-gather"] == 8 * 128 * 2 * 3 / 4
    assert sent["reduce-scatter"] == 6 * 128 * 4 / 2
    assert sent["all-reduce"] == 2 * (6 * 128 * 4 + 128 * 4) * 7 / 8


def test_kernels_count_by_what_they_declare(facts):
    assert (facts.kernel_calls, facts.kernel_flops, facts.kernel_bytes) == (1, 50, 60)


def test_a_splash_kernel_counts_by_its_operands():
    # Before queries and keys come the blocks of the mask, as integers.
    found = counted.facts(
        "ENTRY %main (q: bf16[2,4,256,128]) -> bf16[2,4,256,128] {\n"
        "  %blocks = s8[2,2,2]{2,1,0} constant({...})\n"
        "  %q = bf16[2,4,256,128]{3,2,1,0} parameter(0)\n"
        "  ROOT %splash_mha_dq_no_residuals.1 = bf16[2,4,256,128]{3,2,1,0} custom-call(%blocks, %q,"
        ' %q, %q), custom_call_target="tpu_custom_call"\n}\n'
    )
    assert (found.kernel_calls, found.kernel_flops) == (1, 3 * (2 * 4 * 256 * 128) * 256)


def test_arrays_that_a_loop_leaves_are_saved_for_the_backward_pass(facts):
    assert facts.saved_bytes == 3 * 8 * 128 * 2 and facts.gradient_bytes == 0


def test_arrays_that_one_fusion_fills_are_saved_each():
    stack = "bf16[3,8,128]{2,1,0}"
    text = (
        f"%body (p: (s32[], {stack}, {stack}, {stack})) -> (s32[], {stack}, {stack}, {stack}) {{\n"
        f"  %p = (s32[], {stack}, {stack}, {stack}) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n"
        f"  %read = {stack} get-tuple-element(%p), index=1\n"
        f"  %a = {stack} get-tuple-element(%p), index=2\n"
        f"  %b = {stack} get-tuple-element(%p), index=3\n"
        f"  %both = ({stack}, {stack}) fusion(%read, %a, %b), kind=kLoop, calls=%f\n"
        f"  %first = {stack} get-tuple-element(%both), index=0\n"
        f"  %second = {stack} get-tuple-element(%both), index=1\n"
        f"  ROOT %t = (s32[], {stack}, {stack}, {stack}) tuple(%i, %read, %first, %second)\n}}\n"
        f"ENTRY %main (x: {stack}) -> {stack} {{\n"
        f"  %x = {stack} parameter(0)\n"
        f"  %start = (s32[], {stack}, {stack}, {stack}) tuple(%x, %x, %x, %x)\n"
        f"  ROOT %loop = (s32[], {stack}, {stack}, {stack}) while(%start), condition=%c, body=%body, "
        'backend_config={"known_trip_count":{"n":"3"}}\n}\n'
    )
    # What the loop only reads is no result of it.
    assert counted.facts(text).saved_bytes == 2 * 3 * 8 * 128 * 2


def test_bytes_are_padded_to_tiles_and_vmem_is_free():
    assert hlo.in_hbm("f32[6,100]{1,0:T(8,128)}") == 8 * 128 * 4
    assert hlo.in_hbm("f32[6,100]{0,1:T(8,128)}") == 104 * 128 * 4
    assert hlo.in_hbm("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 0


def test_a_loop_that_cannot_be_read_counts_once_and_is_named():
    found = counted.facts(TEXT.replace("direction=LT", "direction=GE"))
    assert set(found.unread_loops) == {"while.1", "while.2"}
    assert found.flops == 2 * 8 * 128 * 128


def test_products_over_a_batch_that_are_written_as_convolutions_count_as_products():
    line = (
        "  %c = bf16[2,4,64,577]{3,2,1,0} convolution(%a, %b), "
        "window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0f1b_01oi->01bf"
    )
    table = {"a": hlo.operation("  %a = bf16[2,577,4,64]{3,2,1,0} parameter(0)"),
             "b": hlo.operation("  %b = bf16[2,4,577,577]{3,2,1,0} parameter(1)")}  # fmt: skip
    assert counted.flops_of(hlo.operation(line), table) == 2 * 2 * 4 * 577 * 577 * 64


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.Module("HloModule empty\n")


@pytest.mark.parametrize("wrong, near", [
    ("v5p-128", "v5p:4x4x4"), ("v5p:4x4x5", "v5p:4x4x8"), ("v5e:32x16", "v5e:16x16"),
    ("v6e:8X8", "v6e:8x8"), ("v7x:2x2x1", "tpu7x:2x2x1"), ("v5litepod-16", "v5e:4x4"),
])  # fmt: skip
def test_a_slice_that_does_not_exist_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"did you mean {near}[?]"):
        topology.named(wrong)


def test_a_device_has_its_share_of_the_chip():
    found = topology.named("tpu7x:2x2x1")
    assert (found.chips, found.device_count) == (4, 8)
    assert found.peak_flops * 2 == CHIPS["v7"].peak_flops
    assert topology.named("v5p:4x4x4").hbm_bytes == 95 * 2**30


def test_without_libtpu_compile_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "--config=tests/tiny.py", "--topology=v5e:2x2"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vlm_jax[aot]'" in said and said.count("\n") == 1


def test_a_wrong_slice_ends_the_command_in_one_line(capsys):
    assert main(["compile", "--config=tests/tiny.py", "--topology=v5p-128"]) == 2
    assert "did you mean v5p:4x4x4?" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--examples=0"], "--examples=0: give a whole number from 1"),
    (["--examples=-5"], "--examples=-5: give a whole number from 1"),
    (["--dollars-per-chip-hour=nan"], "give a price above 0"),
    (["--dollars-per-chip-hour=-1"], "give a price above 0"),
    (["--search", "--examples=5"], "--search ranks by the time of a step and has no epochs"),
    (["--search", "--most=0"], "--most=0: give a whole number from 1"),
    (["--most=3"], "--most=3 is of --search"),
])  # fmt: skip
def test_a_number_that_means_nothing_is_refused_before_anything_is_compiled(flags, said, capsys):
    assert main(["compile", "--config=tests/tiny.py", "--topology=v5e:2x2", *flags]) == 2
    assert said in capsys.readouterr().err
