"""README tables and figures: what is shown comes from the newest result that has it, and a stale README is noticed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from composed import composed  # noqa: E402

NAMES = (
    "denoiser",
    "waterfall",
    "breakdown",
    "kernels",
    "accuracy",
    "job",
    "clip",
    "embedded",
    "fp8",
    "vae",
    "fidelity",
)
README = "# Title\n" + "".join(
    f"<!-- report:{n} -->\nold {n}\n<!-- /report:{n} -->\nkept {n}\n" for n in NAMES
)


def environment(date: str) -> dict:
    return {"gpu": "GPU X", "torch": "2.11", "cuda": "13.0", "commit": "abcdef0123", "date": date,
            "nvidia_smi": {"power.limit": "700.00 W"}}  # fmt: skip


def variant(seconds: float, peak: float) -> dict:
    gpu = {"sm_mhz": {"median": 1755.0}, "power_w": {"median": 690.0}}
    return {"median_s": seconds, "iqr_s": 0.011, "tflop_s": 700.0, "own_peak_gib": peak, "gpu": gpu}


DENOISER = {
    "kind": "denoiser", "environment": environment("2026-01-02T00:00:00"),
    "cases": {"720": {
        "variants": {"ours": variant(3.125, 8.5), "ours_pair": variant(6.5, 9.5), "diffusers": variant(4.75, 11.0)},
        "first_call_s": {"ours": 12.5, "diffusers": 5.5},
    }},
    "trace": {"ours": {"classes_ms": {"attention": 2600.0, "gemm": 450.0, "pointwise": 60.0, "copy": 1.0},
                       "idle_ms": 2.0, "other_share": 0.0202, "span_ms": 3113.0}},
    "waterfall": {"plain": {"median_s": 4.0}, "fused": {"median_s": 3.2}, "shared_pair": {"median_s": 6.0, "per_call_s": 3.0}},
    "accuracy": {"grid": [4, 16, 24], "relative_l2": {"ours_bf16": 0.007, "reference_ops_bf16": 0.0071, "diffusers_bf16": 0.009}},
    "job": {"steps": 35, "calls": 70, "seconds": 217.5, "prepare_s": 0.25, "peak_gib": 9.5},
}  # fmt: skip
KERNELS = {"environment": environment("2026-01-01T00:00:00"), "rows": [
    {"op": "gelu", "case": "720p", "candidate": "triton", "ms": 0.5, "copy_pct": 91.0},
    {"op": "gelu", "case": "720p", "candidate": "eager", "ms": 1.5, "copy_pct": 30.0},
]}  # fmt: skip
PIPELINE = {"kind": "pipeline", "model": "edge", "steps": [2], "environment": environment("2026-01-01T00:00:00"), "clips": [
    {"stages": {"encode": {"seconds": 2.5, "peak_bytes": 2**31}, "denoise": {"seconds": 13.0, "peak_bytes": 12 * 2**30}}},
]}  # fmt: skip
VAE = {"kind": "vae", "environment": environment("2026-01-01T00:00:00"), "cases": {"720": {"variants": {
    "ours_encode": {"median_s": 1.5}, "ours_decode": {"median_s": 2.5}, "diffusers_decode": {"median_s": 5.5},
}}},
    "stages": {"decode": {"seconds": 2.5, "rest_s": 0.01, "rows": {"704 rows": {"seconds": 0.5, "tflop_s": 500.0, "floor_share": 0.625}}}},
    "windows": {"decode, window 1": {"seconds": 2.5, "call_gib": 5.25}, "decode, 4 strips": {"seconds": 3.0, "call_gib": 2.25, "told_gib": 2.0},
                "decode, window 4": {"error": "out of memory"}},
    "accuracy": {"size": [17, 352, 640], "fp32_max_difference": {"encode, window 1": 1e-6, "encode, window 4": 2e-6, "decode, window 1": 3e-6},
                 "bf16_relative_l2": {"ours_encode": 0.01, "ours_decode": 0.02, "diffusers_encode": 0.03, "diffusers_decode": 0.04}},
    "clip": {"cpus": 16, "last_step_to_mp4_s": 2.25, "runs": [
        {"content": "grain", "last_step_to_mp4_s": 3.5, "stages": {"decode": {"seconds": 3.0}, "write": {"seconds": 0.5}}},
        {"content": "a clip", "last_step_to_mp4_s": 2.25, "stages": {"decode": {"seconds": 1.75}, "write": {"seconds": 0.375, "beside_s": 1.5}}}]},
}  # fmt: skip

FP8 = {"kind": "fp8", "environment": environment("2026-01-03T00:00:00"),
    "call": {
        "variants": {"exact": variant(3.25, 0), "fp8": variant(2.25, 0), "diffusers_compiled": variant(3.6, 0)},
        "recipes": {"exact": {"weights_gib": 5.5, "own_peak_gib": 11.0, "relative_l2_to_exact": 0.0},
                    "fp8": {"weights_gib": 2.875, "own_peak_gib": 8.5, "relative_l2_to_exact": 0.05}, "diffusers_compiled": {}},
    },
    "linears": {
        "block": {"bf16": {"ms": 15.0}, "fp8": {"ms": 9.5, "relative_l2": 0.025}, "te, current scaling": {"ms": 11.5},
                  "te, delayed scaling": {"error": "absent"}},
        "fc1": {"fp8 triton a": {"ms": 2.5, "tflop_s": 1130.0}, "fp8 triton b": {"ms": 2.25, "tflop_s": 1256.0}},
    },
    "te_call": {"variants": {"exact": variant(3.5, 0), "fp8_te": variant(3.0, 0)},
                "recipes": {"exact": {"weights_gib": 5.5}, "fp8_te": {"weights_gib": 3.0, "own_peak_gib": 9.0, "relative_l2_to_exact": 0.06}}},
    "budget": {"grid": [24, 88, 160], "relative_l2": {"all": {"0": 0.04, "10": 0.03}, "MLP": {"10": 0.02}, "lost": {}}},
}  # fmt: skip
SCORE = {"value": 0.75, "weight_0": 0.25, "shuffled": 0.125, "ceiling": 0.875, "gain": 0.8}
EMBEDDED = {
    "kind": "embedded", "clips": 24, "environment": environment("2026-01-01T00:00:00"),
    "embedded": {
        "controls": {"edge": SCORE, "edge_distilled": SCORE | {"value": 0.7}, "multi_seg": SCORE},
        "prompt": {"base": {"right": 93, "of": 100}, "distilled": {"right": 88, "of": 100}},
        "vae_psnr_db": 31.25, "overlap_psnr_db": 33.5,
    },
    "goals": [{"metric": "gain.edge", "passed": True}, {"metric": "vae_psnr_db", "passed": False}],
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "gpu-x"
    folder.mkdir(parents=True)
    for name, record in (
        ("a-denoiser", DENOISER),
        ("a-kernels", KERNELS),
        ("a-vae", VAE),
        ("a-clip", PIPELINE),
        ("a-embedded", EMBEDDED),
        ("a-fp8", FP8),
    ):
        (folder / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def report(place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    where = ("--results", str(place / "results"), "--readme", str(place / "README.md"))
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *where, *options]
    return subprocess.run(command, capture_output=True, text=True)


def figures(place: Path) -> dict:
    return json.loads(report(place, "--figures").stdout)


def test_tables_replace_only_what_is_between_markers(place: Path) -> None:
    assert report(place).returncode == 0
    text = (place / "README.md").read_text()
    assert "old " not in text and all(f"kept {n}\n" in text for n in NAMES) and text.startswith("# Title\n")
    assert (
        "| ours | 1 | 3.125 | 0.011 | 1.00 | 700 |" in text
        and "| diffusers | 1 | 4.750 | 0.011 | 1.52 |" in text
    )
    assert "| diffusers, twice | 2 | 9.500 | 0.022 | 1.46 |" in text and "power limit 700.00 W" in text
    assert "| + block 0 shared by both prompts | 3.000 | 1.33 |" in text
    assert "| ours | 2600.0 | 450.0 | 60.0 | 1.0 | 2.0 | 2.02 |" in text
    assert "| gelu, 720p | triton | 0.500 | 91 | 3.00 | – |" in text
    assert "| whole call, latent 4 x 16 x 24 | 7.00e-03 | 7.10e-03 | 9.00e-03 |" in text
    assert "| 35 steps, uninterrupted | 70 | 217.5 | 0.25 | 9.5 |" in text


def test_8_bit_calls_and_layers_beside_their_peers(place: Path) -> None:
    report(place)
    text = (place / "README.md").read_text()
    assert (
        "| ours, linear layers and attention in 8 bits | 2.250 | 0.011 | 1.60 | 2.88 | 8.50 | 5.00e-02 |"
        in text
    )
    assert "| first layer of the MLP with GELU, fp8 triton b | 2.250 | 1256 | – |" in text
    assert "triton a" not in text and "te, delayed scaling" not in text
    found = figures(place)
    assert found["denoiser_call_s.fp8"]["peer"] == {"exact": 3.25, "diffusers_compiled": 3.6}
    assert (
        found["linears_ms.fp8"]["value"] == 9.5
        and found["linears_ms.fp8"]["peer"]["te, current scaling"] == 11.5
    )
    assert found["denoiser_weights_gib.fp8"]["value"] == 2.875
    assert found["denoiser_call_s.fp8_te"]["value"] == 3.0 and found["denoiser_call_s.fp8_te"]["peer"] == {
        "exact": 3.5
    }
    assert (
        "| ours, linear layers of Transformer Engine | 3.000 | 0.011 | – | 3.00 | 9.00 | 6.00e-02 |" in text
    )
    assert "| all | 4.00e-02 | 3.00e-02 |\n| MLP | – | 2.00e-02 |\n" in text and "lost" not in text


def test_the_vae_beside_its_peers_with_stages_windows_errors_and_a_clips_end(place: Path) -> None:
    report(place)
    text = (place / "README.md").read_text()
    assert "| decode, ours | 2.500 | 1.00 | – | – | – |" in text
    assert "| decode, diffusers | 5.500 | 2.20 | – | – | – |" in text
    assert "| decode, 704 rows | 500.0 | 500 | 62 |" in text and "| decode, the rest | 10.0 | – | – |" in text
    assert "| decode, 4 strips | 3.000 | 2.25 | 2.00 |" in text and "window 4" not in text
    assert "| encode, 17 x 352 x 640 | 2.0e-06 | 1.00e-02 | 3.00e-02 |" in text
    assert "| a clip | 2.25 | 1.75 | 0.38 | 1.50 | 16 |" in text and "| grain | 3.50 |" in text
    found = figures(place)
    assert (
        found["vae_decode_s"]["peer"] == {"diffusers": 5.5} and found["last_step_to_mp4_s"]["value"] == 2.25
    )
    assert found["vae_decode_peak_gib.strips"]["value"] == 2.25
    assert found["vae_encode_error"]["peer"] == {"diffusers": 0.03}


def test_each_part_of_the_vae_is_of_the_newest_record_that_has_it(place: Path) -> None:
    newer = {
        "kind": "vae",
        "environment": environment("2026-02-01T00:00:00"),
        "clip": VAE["clip"] | {"last_step_to_mp4_s": 1.25},
    }
    path = place / "results" / "gpu-x" / "b-vae.json"
    path.write_text(json.dumps(newer))
    report(place)
    text, found = (place / "README.md").read_text(), figures(place)
    assert "| decode, 704 rows | 500.0 | 500 | 62 |" in text and text.count("| a clip |") == 1
    assert found["last_step_to_mp4_s"]["value"] == 1.25 and found["last_step_to_mp4_s"]["file"].endswith(
        path.name
    )
    assert found["vae_decode_s"]["value"] == 2.5 and found["vae_decode_s"]["file"].endswith("a-vae.json")


def test_calls_that_the_newest_run_left_out_stay_with_the_run_that_had_them(place: Path) -> None:
    call = {"variants": {"exact": variant(3.0, 0), "fp8": variant(2.0, 0)}, "recipes": FP8["call"]["recipes"]}
    newer = {"kind": "fp8", "environment": environment("2026-02-01T00:00:00"), "call": call}
    (place / "results" / "gpu-x" / "b-fp8.json").write_text(json.dumps(newer))
    report(place)
    text, found = (place / "README.md").read_text(), figures(place)
    assert (
        text.index("| ours, exact | 3.000 |")
        < text.index("| ours, exact | 3.250 |")
        < text.index("Transformer Engine | 3.000")
    )
    assert found["denoiser_call_s.fp8"]["value"] == 2.0 and found["denoiser_call_s.fp8_te"]["value"] == 3.0
    assert "diffusers_compiled" not in found["denoiser_call_s.fp8"]["peer"], (
        "times are compared within one run"
    )


def test_check_notices_a_stale_readme_and_leaves_it(place: Path) -> None:
    before = (place / "README.md").read_text()
    done = report(place, "--check")
    assert done.returncode == 1 and "differs from the result files" in done.stdout
    assert (place / "README.md").read_text() == before
    report(place)
    assert report(place, "--check").returncode == 0
    edited = (place / "README.md").read_text().replace("3.125", "3.025")
    (place / "README.md").write_text(edited)
    assert report(place, "--check").returncode == 1


def test_figures_name_value_unit_file_and_peer(place: Path) -> None:
    found = figures(place)
    assert found["denoiser_call_s.exact"] == {
        "value": 3.125, "unit": "s", "file": "bench/results/gpu-x/a-denoiser.json", "peer": {"diffusers": 4.75},
    }  # fmt: skip
    assert found["denoiser_pair_s.exact"]["value"] == 6.5 and found["denoiser_pair_s.exact"]["peer"] == {
        "diffusers": 9.5
    }
    assert found["pointwise_share.exact"]["value"] == 0.0202
    assert found["denoiser_peak_gib.exact"] == {
        "value": 9.5, "unit": "GiB", "file": "bench/results/gpu-x/a-denoiser.json", "peer": {"diffusers": 11.0},
    }  # fmt: skip
    assert found["vae_encode_s"]["value"] == 1.5 and found["vae_decode_s"]["peer"] == {"diffusers": 5.5}
    assert found["call_error.exact"]["peer"]["reference_ops_bf16"] == 0.0071


def test_an_added_up_job_says_so_and_a_small_kernel_is_beside_a_small_copy(place: Path) -> None:
    newer = {"kind": "denoiser", "environment": environment("2026-02-01T00:00:00")}
    case = {"variants": DENOISER["cases"]["720"]["variants"], "prepare_s": 0.5}
    vae = {
        "ours_encode": {"median_s": 2.0},
        "ours_decode": {"median_s": 3.0},
        "diffusers_decode": {"median_s": 9.0},
    }
    newer["composed_job"] = composed(case, 35, vae, "v.json")
    newer["first"] = {
        "cold": {"first_call": 9.5, "capture": 2.5},
        "warm": {"first_call": 1.5, "capture": 2.25},
    }
    (place / "results" / "gpu-x" / "0-newer.json").write_text(json.dumps(newer))
    small = {
        "op": "patchify",
        "case": "720p",
        "candidate": "triton",
        "ms": 0.01,
        "copy_pct": 70.0,
        "equal_copy_graph_pct": 96.0,
    }
    kernels = KERNELS | {"environment": environment("2026-02-01T00:00:00"), "rows": [small]}
    (place / "results" / "gpu-x" / "0-kernels.json").write_text(json.dumps(kernels))
    report(place)
    text, found = (place / "README.md").read_text(), figures(place)
    assert "| 35 steps, uninterrupted | 70 | 217.5 |" in text
    assert "| ours, 35 steps, added up from measured calls | 70 | 228.0 | 0.50 |" in text  # 0.5 + 35 * 6.5
    assert "| diffusers, 35 steps, added up from measured calls | 70 | 332.5 | 0.00 |" in text  # 70 * 4.75
    assert found["job_added_up_s.exact"]["value"] == 233.0 and found["job_added_up_s.exact"]["peer"] == {}
    assert (found["first_call_s.cold"]["value"], found["capture_s.warm"]["value"]) == (9.5, 2.25)
    assert "| patchify, 720p | triton | 0.010 | 70; 96 of a copy as small |" in text
    assert "seconds" not in composed(case, 4)["rows"]["ours"]


def test_newest_result_wins_part_by_part(place: Path) -> None:
    newer = {"kind": "denoiser", "environment": environment("2026-02-01T00:00:00")}
    newer["cases"] = copy.deepcopy(DENOISER["cases"])
    newer["cases"]["720"]["variants"]["ours"]["median_s"] = 3.0
    (place / "results" / "gpu-x" / "0-newer.json").write_text(json.dumps(newer))
    found = figures(place)
    assert found["denoiser_call_s.exact"]["value"] == 3.0
    assert found["denoise_clip_s.exact"]["value"] == 217.5  # only the older one has it


def test_kernels_of_several_files_are_shown_together(place: Path) -> None:
    newer = {"environment": environment("2026-02-01T00:00:00"), "rows": [
        {"op": "adaln", "case": "720p", "candidate": "native", "median_ms": 0.25, "roofline_pct": 93.0},
        {"op": "adaln", "case": "720p", "candidate": "torch.compile", "median_ms": 0.3},
        {"op": "network", "case": "720p-1", "candidate": "triton", "median_ms": 3000.0},
    ]}  # fmt: skip
    (place / "results" / "gpu-x" / "b-adaln.json").write_text(json.dumps(newer))
    report(place)
    text = (place / "README.md").read_text()
    assert "| adaln, 720p | native | 0.250 | 93 | – | 1.20 |" in text
    assert "| gelu, 720p | triton | 0.500 | 91 | 3.00 | – |" in text and "network, " not in text
    assert "b-adaln.json" in text and "a-kernels.json" in text


def test_a_record_is_read_as_its_kind_says(place: Path) -> None:
    before = figures(place)
    report(place)
    text = (place / "README.md").read_text()
    parts = {
        "rows": [{"name": "128x256x64", "ms": 4.5}],
        "clips": 3,
        "trace": {"ours": {}},
        "embedded": True,
        "job": 1,
    }
    other = {"kind": "linear_gelu", "environment": environment("2026-03-01T00:00:00")} | parts
    (place / "results" / "gpu-x" / "z-other.json").write_text(json.dumps(other))
    assert figures(place) == before and report(place).returncode == 0
    assert (place / "README.md").read_text() == text
    (place / "results" / "gpu-x" / "a-kernels.json").write_text(json.dumps(KERNELS | {"kind": "kernels"}))
    assert report(place, "--check").returncode == 0  # kernels, whether or not the record says so


@pytest.mark.parametrize("args", [{"smoke": "True"}, {"smoke": "False", "grid": "8,16,16"}])
def test_dry_runs_and_other_sizes_are_no_results(place: Path, args: dict) -> None:
    newer = copy.deepcopy(DENOISER) | {"environment": environment("2026-02-01T00:00:00"), "args": args}
    newer["job"]["seconds"] = 1.0
    (place / "results" / "gpu-x" / "dry.json").write_text(json.dumps(newer))
    assert figures(place)["denoise_clip_s.exact"]["value"] == 217.5


def test_two_gpu_kinds_keep_their_figures_apart_and_cpu_has_none(place: Path) -> None:
    for kind in ("gpu-y", "cpu"):
        (place / "results" / kind).mkdir()
        (place / "results" / kind / "b.json").write_text(json.dumps(DENOISER))
    keys = figures(place)
    assert {"denoiser_call_s.exact.gpu-x", "denoiser_call_s.exact.gpu-y", "vae_decode_s.gpu-x"} <= set(keys)
    assert not any(key.endswith(".cpu") or key == "denoiser_call_s.exact" for key in keys)


def test_without_results_and_with_broken_markers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    assert report(tmp_path, "--figures").stdout.strip() == "{}"
    assert report(tmp_path).returncode == 0
    assert (tmp_path / "README.md").read_text().count("Not measured yet.") == len(NAMES)
    for text, message in (
        ("<!-- report:nope -->\n<!-- /report:nope -->\n", "got 'nope'"),
        ("<!-- report:job -->\n", "needs its"),
    ):
        (tmp_path / "README.md").write_text(text)
        done = report(tmp_path, "--check")
        assert done.returncode != 0 and message in done.stderr


def test_trace_classes_and_shares() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("cosmos_trace", ROOT / "tools" / "trace.py")
    assert spec is not None and spec.loader is not None
    trace = sys.modules["cosmos_trace"] = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(trace)
    sys.path[:] = before
    kinds = {
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "triton_red_fused__scaled_dot_product_flash_attention_add_mul_3": "pointwise",
        "nvjet_tst_256x128_64x4_2x1_v_bz_TNT": "gemm",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "gemm",
        "void cublasLt::splitKreduce_kernel<32, 16>": "gemm",
        "_adaln_kernel": "pointwise",
        "_gelu_kernel": "pointwise",
        "_linear_gelu_kernel": "gemm",
        "_qk_norm_rope_kernel": "pointwise",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernel>": "pointwise",
        "Memcpy DtoD (Device -> Device)": "copy",
    }
    assert {name: trace.kind_of(name) for name in kinds} == kinds
    events = [
        {"ph": "X", "cat": "kernel", "name": "flash_fwd", "ts": 1000.0, "dur": 6000.0},
        {"ph": "X", "cat": "kernel", "name": "nvjet_a", "ts": 7000.0, "dur": 2500.0},
        {"ph": "X", "cat": "kernel", "name": "_adaln_kernel", "ts": 9500.0, "dur": 500.0},
        {"ph": "X", "cat": "kernel", "name": "_adaln_kernel", "ts": 10500.0, "dur": 500.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "ts": 0.0, "dur": 99000.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 5.0},
    ]
    found = trace.from_events(events)
    assert found.span_ms == 10.0 and abs(found.other_share - 0.15) < 1e-12
    assert [(r.name, r.calls, r.ms) for r in found.rows] == [
        ("flash_fwd", 1, 6.0),
        ("nvjet_a", 1, 2.5),
        ("_adaln_kernel", 2, 1.0),
    ]
    assert found.as_dict()["idle_ms"] == 0.5
    with pytest.raises(RuntimeError, match="no kernel was recorded"):
        trace.from_events(events[4:])


def test_the_embedded_model_stands_beside_its_baselines_and_misses_are_told(place: Path) -> None:
    assert report(place).returncode == 0
    text = (place / "README.md").read_text()
    assert "| edge F1 | 0.750 | 0.250 | 0.125 | 0.875 | 80 |" in text
    assert "| colour asked for, four steps | 88 of 100 |" in text and "Goals missed: vae_psnr_db." in text
    found = figures(place)
    assert found["edge_f1.base"]["value"] == 0.75 and found["edge_f1.distilled"]["value"] == 0.7
    assert found["seg_miou.multi"]["value"] == 0.75 and found["edge_gain.base"]["value"] == 0.8
    assert found["prompt.distilled"]["value"] == 0.88 and found["vae_psnr_db"]["unit"] == "dB"
