"""From a profiler's events to shares of the time, by category."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tinyllama.errors import ConfigError
from train.profiling import Profiler, by_category, category, parse, shares, summary, table

# Names as CUPTI reports them: cuBLAS, CUTLASS, cuDNN, flash-attn, torch, Triton by torch's compiler, liger, NCCL.
NAMES = {
    "GEMM": (
        "nvjet_hsh_192x192_64x4_2x1_v_bz_coopB_TNT",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(...)",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)",
        "aten::addmm",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x128x64_1x4x1_kernel0_0",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        "triton_tem_fused_flex_attention_0",
        "BlockedAttentionBackward",
    ),
    "elementwise/norm": (
        "triton_poi_fused__to_copy_mul_silu_0",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<...>>>(...)",
        "_rms_norm_forward_kernel",
    ),
    "loss": ("liger_cross_entropy_kernel", "void at::native::(anonymous namespace)::cunn_SoftMaxForward<...>(...)"),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float>>",
    ),
    "copy/memset": ("Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "void at::native::bfloat16_copy_kernel_cuda"),
    "communication": (
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
    ),
    "other": ("_some_kernel_of_tomorrow",),
}


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_kernels_name_says_what_it_does(expected, name):
    assert category(name) == expected


def test_shares_add_up_and_the_longest_is_first():
    rows = table({"nvjet_a": (600.0, 3), "triton_b": (300.0, 30), "nvjet_c": (100.0, 1)})
    assert [(row.name, row.share, row.calls) for row in rows] == [
        ("nvjet_a", 0.6, 3),
        ("triton_b", 0.3, 30),
        ("nvjet_c", 0.1, 1),
    ]
    assert by_category(rows) == pytest.approx({"GEMM": 0.7, "elementwise/norm": 0.3})
    assert summary(rows) == "GEMM 70.0%, elementwise/norm 30.0%"
    assert table({}) == []


def test_the_own_time_of_operators_counts_once():
    """Against the profiler's own total: what an operator calls is not counted again in it."""
    a = torch.randn(256, 256)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            torch.nn.functional.linear(a, a).relu().sum()
    rows = {row.name: row for row in shares(profiled)}
    assert rows["aten::mm"].calls == 3
    assert rows["aten::mm"].category == "GEMM"
    assert sum(row.total_us for row in rows.values()) == pytest.approx(
        profiled.key_averages().total_average().self_cpu_time_total
    )
    assert sum(row.share for row in rows.values()) == pytest.approx(1)


def test_what_is_to_be_profiled():
    assert parse("3:2") == (3, 2)
    for wrong in ("", "3", "0:2", "3:0", "a:b", "3:2:1", "²:1"):
        with pytest.raises(ConfigError, match="FIRST:COUNT"):
            parse(wrong)


@pytest.mark.parametrize(("steps", "profiled"), [(2, False), (3, False), (4, True), (9, True)])
def test_a_run_has_its_profile_where_it_made_the_steps(tmp_path, steps, profiled):
    """Of steps 3 and 4; a run that stops after them, or in the middle, says what became of it."""
    profiler = Profiler((2, 2), tmp_path / "profile", active=True)
    a = torch.randn(8, 8)
    for _ in range(steps):
        profiler.begin()
        torch.mm(a, a)
    text = profiler.close()
    if profiled:
        rows = {row["name"]: row for row in json.loads((tmp_path / "profile/kernels.json").read_text())["kernels"]}
        assert rows["aten::mm"]["calls"] == 2
        assert text.startswith("profile of 2 steps in ")
    else:
        assert not (tmp_path / "profile").exists()
        assert text == "no profile: the run ended before --profile's 2 + 2 steps were done"
