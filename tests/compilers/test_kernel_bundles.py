"""Bundles of TPU kernels, counted in code as the compiler prints it."""

import pytest

from deltaproduct_jax.compilers import kernel_bundles

# A grid of 4 steps, whose loop passes 6 times, and in each step a loop of 3 passes and one of 5.
CODE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: bf16[4,64], index: 0] }
   0x1   :  { %5 = vsyncpa [#allocation6], 0 } /* Start region 1 */
   0x2 LB: > { %s3_s1 = sphi 0, %s9_s1 /* phi copy :: iteration index, stage = 0 */  ;;  %p1 = x
   0x3 PF: > { %v1_v0 = vld [vmem:[%s1_s0] sm:$0xff]
second_minor_factor: 1 */ }
   0x4   :  {} /* End region 22 */
   0x5 LB: >> { %s4_s2 = sphi 0, %s5_s2 /* phi copy */ }
   0x6   : >> { %p7_p1 = scmp.ge.s32.totalorder %s5_s2, 3 /* loop exit test */ }
   0x7 LB: >> { %s6_s2 = sphi 0, %s7_s2 /* phi copy */ }
   0x8   : >> { %p8_p1 = scmp.ge.s32.totalorder %s7_s2, 5 /* loop exit test */ }
   0x9   : > { %p2_p5 = scmp.ge.s32.totalorder %s9_s1, 6 /* loop exit test */  ;;  %x = y }
   0xa   :  { %8 = vsyncpa [#allocation6], 1 }
   0xb   : > { %s9_s9 = smov.u32 %s8_s8 /* copy for cssa */ }
"""


def test_bundles_are_multiplied_by_the_passes_of_loops():
    # 3 outside; in a step 5 of its own, an empty one among them, 2 in each pass of the loops.
    assert kernel_bundles.bundles(CODE) == 3 + 4 * (5 + 3 * 2 + 5 * 2)


def test_a_loop_whose_end_is_not_a_constant_is_no_loop_of_one_pass():
    unknown = CODE.replace("%s7_s2, 5 /*", "%s7_s2, %s8_s2 /*")
    assert unknown != CODE
    with pytest.raises(ValueError, match="trip count of a loop of a kernel is not to be seen"):
        kernel_bundles.bundles(unknown)


def test_code_that_begins_inside_of_a_loop_is_refused():
    with pytest.raises(ValueError, match="a loop without a beginning"):
        kernel_bundles.bundles(CODE.replace("LB: > ", "  : > "))


def test_the_code_of_a_kernel_is_found_by_its_label(tmp_path):
    (tmp_path / "17-walk.1-00-schedule-analysis_final_bundles.txt").write_text("nothing")
    (tmp_path / "17-walk.1-01-final_bundles.txt").write_text(CODE)
    (tmp_path / "18-walk.10-01-final_bundles.txt").write_text("nothing")
    assert kernel_bundles.kernel_bundles(tmp_path, "walk.1") == kernel_bundles.bundles(CODE)
    with pytest.raises(ValueError, match=r"the compiler wrote no code of walk\.2"):
        kernel_bundles.kernel_bundles(tmp_path, "walk.2")
