"""8-bit self-attention: what smoothing and rotation keep, layouts, adapters of libraries, proofs, and the schedule."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_fast import attention8, ops, ops_attention8, reference, self_attention
from cosmos_fast.config import NetworkConfig
from cosmos_fast.dispatch import TABLE, use
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.network import Network
from cosmos_fast.recipe import Recipe
from cosmos_fast.self_attention8 import Fp8, SparseFp8, fp8, precise, scheduled
from cosmos_fast.testing import rel_error

L, N, K = 96, 2, 64


def layer(outliers: float = 1.0, shift: float = 0.0) -> tuple[Tensor, ...]:
    """qkv, gains, cos, sin; outliers: gain of two channels; shift: of keys and values, the same for all tokens."""
    qkv, angle = torch.randn(L, 3 * N * K), torch.rand(L, K // 2) * 0.1
    qkv[:, N * K :] += shift * torch.randn(2 * N * K)
    q_gain, k_gain = (1 + 0.1 * torch.randn(K) for _ in "qk")
    for gain in (q_gain, k_gain):
        gain[[3, 40]] *= outliers
    return qkv, q_gain, k_gain, angle.cos(), angle.sin()


def error(given: tuple[Tensor, ...], **choices: Any) -> float:
    exact = self_attention.exact(*given, 0)
    codes = ops_attention8.qkv_codes(*given, **choices)
    return rel_error(ops_attention8.attention_fp8(codes, torch.float32).flatten(1), exact)


# --- what the codes are ---


def test_a_layer_in_8_bits_is_near_the_exact_one() -> None:
    given = layer()
    out = Fp8()(*given, 0)
    assert out.shape == (L, N * K) and out.dtype == given[0].dtype
    assert 1e-3 < rel_error(out, self_attention.exact(*given, 0)) < 0.06


def test_removing_means_pays_where_keys_or_values_are_shifted() -> None:
    given = layer(shift=6.0)
    moments = ops_attention8.qkv_moments(*given)
    k_mean, v_mean, _, steps = moments
    v = given[0][:, 2 * N * K :].view(L, N, K)
    wide = reference.power_of_two(v.abs().amax(0) / 448)
    kept = error(given, moments=(k_mean * 0, v_mean * 0, wide, steps))
    assert error(given, moments=moments) < 0.5 * kept


def test_codes_of_v_are_off_by_nothing_together() -> None:
    """What all codes of a channel are off by is all that attention over many tokens shows of their rounding."""
    tokens = 20000
    angle = torch.zeros(tokens, K // 2)
    for shift in (0.003, 0.3, 3.0):
        qkv = (torch.randn(tokens, 3 * K) + shift * torch.randn(3 * K)).bfloat16()
        given = qkv, torch.ones(K).bfloat16(), torch.ones(K).bfloat16(), angle.cos(), angle.sin()
        moments = ops_attention8.qkv_moments(*given)
        codes = ops_attention8.qkv_codes(*given, moments=moments)
        v = qkv[:, 2 * K :].double().view(tokens, 1, K)
        off = (codes.v.double() * codes.v_step + codes.v_mean - v).mean(0)
        chance = 0.03 / tokens**0.5  # codes are off by 0.026 each
        assert off.square().mean().sqrt() < 2 * chance, (shift, float(off.square().mean().sqrt() / chance))
        assert ((v.mean(0) - codes.v_mean).abs() <= v.abs().amax(0) / 32).all()


def spread(given: tuple[Tensor, ...], sizes: list[int]) -> list[ops_attention8.Moments]:
    """Moments as each of several ranks finds them, of consecutive tokens so many each."""
    qkv, q_gain, k_gain, *angles = given
    parts = [(x, q_gain, k_gain, *pair) for x, *pair in zip(*(t.split(sizes) for t in (qkv, *angles)))]
    sent: list[Tensor] = []
    for part in parts:
        ops_attention8.pooled_moments(*part, len(qkv), lambda mine: sent.append(mine) or [mine])
    return [ops_attention8.pooled_moments(*part, len(qkv), lambda mine: sent) for part in parts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_are_those_of_one_rank_bit_for_bit_however_tokens_are_spread(dtype: torch.dtype) -> None:
    tokens = 5000
    qkv, angle = 30 * torch.randn(tokens, 3 * N * K) + torch.randn(3 * N * K), torch.rand(tokens, K // 2)
    qkv[:, 2 * N * K] += 100 * (torch.arange(tokens) > 4000)  # whole ranks of large values, and of small ones
    given = qkv.to(dtype), *(torch.randn(2, K) + 2).to(dtype), angle.cos(), angle.sin()
    alone = ops_attention8.qkv_moments(*given)
    for sizes in ([5000], [2500, 2500], [1667, 1667, 1666], [1, 4997, 1, 1]):
        for found in spread(given, sizes):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), sizes


def test_rotation_pays_where_channels_of_q_and_k_stick_out_together() -> None:
    given = layer(outliers=12.0)
    assert error(given, rotate=True) < 0.5 * error(given, rotate=False)


def test_rotation_keeps_scores_and_lengths() -> None:
    H = reference.hadamard(K)
    torch.testing.assert_close(H @ H.T, torch.eye(K, dtype=torch.float64))
    assert torch.equal(H.abs(), torch.full_like(H, K**-0.5))
    i, j = torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij")
    ones = sum(((i & j) >> bit) & 1 for bit in range(6))
    assert torch.equal(H.sign(), 1.0 - 2.0 * (ones % 2).double())


def test_steps_are_powers_of_two_that_no_code_exceeds() -> None:
    for scale in (1e-3, 1.0, 300.0):
        qkv, q_gain, k_gain, cos, sin = layer(shift=3.0)
        qkv[5, :K] = 0
        qkv[5, 7] = 1e4  # one channel holds all of a head: as large as a normed entry gets
        given = qkv * scale, q_gain * scale, k_gain, cos, sin
        k_mean, v_mean, v_step, steps = ops_attention8.qkv_moments(*given)
        for step in (v_step, steps[:2]):
            assert torch.equal(torch.frexp(step).mantissa, torch.full_like(step, 0.5))
        assert steps[2] == steps[0] * steps[1] / K**0.5
        q, k, v = ops.qk_norm_rope(*given)
        k, H = k - k_mean, reference.hadamard(K).float()
        for rotate in (False, True):
            codes = ops_attention8.qkv_codes(*given, rotate=rotate)
            # Three bits behind the point: 1/16 off at most. What saturates is off by more.
            for code, x, step in ((codes.q, q, steps[0]), (codes.k, k, steps[1])):
                x = x @ H if rotate else x
                torch.testing.assert_close(code.float() * step, x, rtol=1 / 16, atol=float(step) * 2**-9)
            torch.testing.assert_close(
                codes.v.float() * v_step, v - v_mean, rtol=1 / 16, atol=float(v_step.max()) * 2**-9
            )


def test_codes_do_not_depend_on_the_step() -> None:
    given = layer()
    k_mean, v_mean, v_step, steps = ops_attention8.qkv_moments(*given)
    one = ops_attention8.qkv_codes(*given, moments=(k_mean, v_mean, v_step, steps))
    two = ops_attention8.qkv_codes(*given, moments=(k_mean, v_mean, 4 * v_step, steps))
    same = (one.v.float() * one.v_step == two.v.float() * two.v_step).float().mean()
    assert same > 0.99  # but for what becomes subnormal


def test_a_constant_channel_and_no_tokens_have_a_step() -> None:
    qkv, *rest = layer()
    qkv[:, 2 * N * K] = 3.0
    _, v_mean, v_step, _ = ops_attention8.qkv_moments(qkv, *rest)
    assert v_mean[0, 0] == 3.0 and v_step[0, 0] == 1.0
    nothing = ops_attention8.qkv_moments(qkv[:0], *rest[:2], *(table[:0] for table in rest[2:]))
    assert torch.equal(nothing[0], torch.zeros(N, K)) and torch.equal(nothing[2], torch.ones(N, K))


def test_a_nan_is_not_hidden() -> None:
    qkv, *rest = layer()
    qkv[7, -1] = float("nan")
    assert Fp8()(qkv, *rest, 0)[:, -1].isnan().all()


def test_packed_values_come_back_and_end_in_zeros() -> None:
    v = torch.randn(37, N, K).to(torch.float8_e4m3fn)
    packed = reference.packed(v)
    assert packed.shape == (N, K, 48) and packed.is_contiguous()
    assert torch.equal(reference.unpacked(packed, 37), v)
    assert (
        packed[:, :, 32:][..., [place for place in range(16) if reference.PACK[place] >= 5]]
        .float()
        .abs()
        .max()
        == 0
    )
    # Place 2 of a group of 16 holds its token 8, place 4 its token 2, place 8 its token 4.
    for place, token in ((1, 1), (2, 8), (4, 2), (8, 4)):
        assert torch.equal(packed[:, :, 16 + place].float(), v[16 + token].float())
    given = layer()
    plain, other = (ops_attention8.qkv_codes(*given, pack=pack) for pack in (False, True))
    assert torch.equal(reference.unpacked(other.v, L), plain.v)
    assert torch.equal(ops_attention8.attention_fp8(plain), ops_attention8.attention_fp8(other))


def test_wrong_operands_are_named() -> None:
    codes = torch.zeros(4, N, K, dtype=torch.float8_e4m3fn)
    table, step = torch.ones(N, K), torch.ones(1)
    call = torch.ops.cosmos_fast.attention_fp8
    with pytest.raises(RuntimeError, match="all float8_e4m3fn"):
        call(codes.float(), codes, codes, step, table, table, torch.bfloat16)
    with pytest.raises(RuntimeError, match="at least one key"):
        call(codes, codes[:0], codes[:0], step, table, table, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"contiguous \(2, 64\) float32"):
        call(codes, codes, codes, step, table[:1], table, torch.bfloat16)
    qkv, *rest = torch.randn(3, 3 * 96), torch.ones(96), torch.ones(96), torch.ones(3, 48), torch.ones(3, 48)
    with pytest.raises(RuntimeError, match="a rotation needs K to be a power of two"):
        ops_attention8.qkv_codes(qkv, *rest)


# --- libraries ---


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loaders that prove themselves on the CPU, and forget that they did."""
    proven = attention8.proven
    monkeypatch.setattr(attention8, "proven", lambda name, attend: proven(name, attend, "cpu"))
    for load in (attention8.load_fa3, attention8.load_cudnn):
        load.cache_clear()
    yield monkeypatch
    for load in (attention8.load_fa3, attention8.load_cudnn):
        load.cache_clear()


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, q_descale: Tensor) -> Tensor:
    """FlashAttention-3 as documented: batch first, one descale per batch and head, bf16 out."""
    assert q_descale.shape == (1, q.shape[2])
    return attention8.emulated(q[0], k[0], v[0], q_descale[0, :1] * softmax_scale, torch.bfloat16)[None]


def test_fa3_gets_its_operands_as_it_documents_them(on_cpu: Any) -> None:
    on_cpu.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=flash))
    operands = attention8.example("cpu")
    got = attention8.load_fa3()(*operands, torch.float32)
    assert torch.equal(got, attention8.emulated(*operands, torch.bfloat16).float())
    assert attention8.load_fa3()(operands[0][:0], *operands[1:], torch.float32).shape == (0, 2, 128)


def test_an_old_fa3_and_one_that_returns_noise_are_refused(on_cpu: Any) -> None:
    def old(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        return q

    def noise(*args: Any, q_descale: Tensor, **rest: Any) -> Tensor:
        return torch.randn(args[0].shape)

    for broken, reason in ((old, "takes no q_descale"), (noise, "It returns noise here")):
        on_cpu.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(flash_attn_func=broken))
        with pytest.raises(RuntimeError, match=reason):
            attention8.load_fa3()


def test_the_example_is_of_codes_with_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.11 torch makes NaN of what e4m3 cannot hold; none of the operands relies on it being 448."""
    plain = Tensor.to

    def strict(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert args != (torch.float8_e4m3fn,) or bool((x.abs() <= 448).all())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", strict)
    q, *_ = attention8.example("cpu")
    assert q.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("fault", [float("nan"), 0.0, 2.0])
def test_what_is_not_attention_is_not_proven(fault: float) -> None:
    def broken(*operands: Any) -> Tensor:
        return attention8.emulated(*operands) * fault

    assert attention8.proven("fine", attention8.emulated, "cpu") is attention8.emulated
    with pytest.raises(RuntimeError, match="broken: relative error of a small example must be at most 0.06"):
        attention8.proven("broken", broken, "cpu")


class FakeCudnn:
    """Accepts one of the variants; its graphs compute what their operands say."""

    heur_mode = types.SimpleNamespace(A="A")
    data_type = types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="fp32", BFLOAT16="bf16", HALF="fp16")

    def __init__(self, accepted: tuple[str, dict[str, Any], set[str]]) -> None:
        self.accepted, self.built = accepted, 0

    def create_handle(self) -> str:
        return "handle"

    def set_stream(self, handle: str, stream: int) -> None:
        assert (handle, stream) == ("handle", 7)

    def backend_version(self) -> int:
        return 91900

    def pygraph(self, **kinds: Any) -> FakeGraph:
        return FakeGraph(self)


@dataclass
class FakeTensor:
    name: str
    uid: int = 0
    is_output: bool = False
    dim: Any = None
    stride: Any = None
    kind: Any = None

    def set_uid(self, uid: int) -> FakeTensor:
        self.uid = uid
        return self

    def set_output(self, value: bool) -> FakeTensor:
        self.is_output = value
        return self

    def set_dim(self, dim: Any) -> FakeTensor:
        self.dim = dim
        return self

    def set_stride(self, stride: Any) -> FakeTensor:
        self.stride = stride
        return self

    def set_data_type(self, kind: Any) -> FakeTensor:
        self.kind = kind
        return self


class FakeGraph:
    def __init__(self, cudnn: FakeCudnn) -> None:
        self.cudnn = cudnn

    def tensor(self, uid: int, dim: Any, stride: Any, data_type: Any) -> FakeTensor:
        return FakeTensor("given", uid, dim=dim, stride=stride, kind=data_type)

    def sdpa_fp8(self, **given: Any) -> list[FakeTensor]:
        names = ("q", "k", "v", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self.given = {name: given.pop(name) for name in names}
        assert given.pop("attn_scale") == 1.0 and given.pop("use_causal_mask") is False
        self.extra = given
        self.outputs = [FakeTensor(name) for name in ("o", "stats", "amax_s", "amax_o")]
        return self.outputs

    def validate(self) -> None:
        o, *_ = self.outputs
        asked = {x.name for x in self.outputs if x.is_output and x.name != "o"}
        if (o.kind, self.extra, asked) != self.cudnn.accepted:
            raise ValueError(f"not {o.kind} {self.extra} {sorted(asked)}")
        assert self.given["q"].dim[2] > 1, "No valid engine configs"
        assert o.dim == self.given["q"].dim and o.stride == self.given["q"].stride and o.is_output

    def build_operation_graph(self) -> None: ...
    def check_support(self) -> None: ...
    def create_execution_plans(self, modes: list[str]) -> None: ...

    def build_plans(self) -> None:
        self.cudnn.built += 1

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[int, Tensor], room: Tensor, handle: str) -> None:
        assert set(pack) == {x.uid for x in (*self.given.values(), *self.outputs) if x.uid}
        x = {name: pack[tensor.uid] for name, tensor in self.given.items()}
        assert float(x["scale_s"] * x["descale_s"]) == 1 == float(x["descale_v"]) == float(x["scale_o"])
        o = pack[self.outputs[0].uid]
        o.copy_(attention8.emulated(x["q"], x["k"], x["v"], x["descale_q"] * x["descale_k"], o.dtype))


@pytest.mark.parametrize(
    "accepted",
    [
        ("bf16", {"generate_stats": False}, {"amax_s", "amax_o"}),
        ("bf16", {"is_inference": True}, {"amax_o"}),
        ("fp16", {"generate_stats": False}, set()),
        ("e4m3", {"is_inference": True}, {"amax_s", "amax_o"}),
    ],
)
def test_cudnn_finds_the_graph_that_its_release_knows(on_cpu: Any, accepted: Any) -> None:
    fake = FakeCudnn(accepted)
    on_cpu.setitem(sys.modules, "cudnn", fake)
    on_cpu.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    operands = attention8.example("cpu")
    attend = attention8.load_cudnn()
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}[accepted[0]]
    expected = attention8.emulated(*operands, kind)
    for _ in range(2):
        assert torch.equal(attend(*operands, torch.float32), expected.float())
    assert fake.built == 1
    attend(operands[0][:5].contiguous(), *operands[1:], torch.float32)
    assert fake.built == 2
    # It has no engine for a single query (`FakeGraph.validate`), which is then computed twice.
    one = attend(operands[0][:1].contiguous(), *operands[1:], torch.float32)
    assert torch.equal(one, attention8.emulated(operands[0][:1], *operands[1:], kind).float())


def test_cudnn_without_such_attention_says_what_it_was_told(on_cpu: Any) -> None:
    on_cpu.setitem(sys.modules, "cudnn", FakeCudnn(("int8", {}, set())))
    with pytest.raises(
        RuntimeError, match="cuDNN 91900 has no such fp8 attention: .*not bf16 .*not fp16 .*not e4m3"
    ):
        attention8.load_cudnn()


# --- policy ---


def test_an_emulation_is_no_choice_on_a_gpu() -> None:
    assert fp8(torch.device("cpu")) == Fp8()
    with (
        use(attention_fp8="emulated"),
        pytest.raises(EnvironmentProblem, match="needs a fast implementation"),
    ):
        fp8(torch.device("cuda"))
    assert TABLE["attention_fp8"].candidates[-2].name == "emulated"


def tiny() -> Network:
    network = Network(NetworkConfig.tiny(blocks=2, control_every=1), Fp8())
    return network.eval().requires_grad_(False)


def test_full_precision_shares_the_weights_and_is_there_only_if_asked_for() -> None:
    network, exact = tiny(), self_attention.exact
    for recipe in (Recipe(), Recipe(attention_head=0.5), Recipe(attention="fp8")):
        assert precise(network, recipe, exact) is None
    twin = precise(network, Recipe(attention="fp8", attention_tail=0.1), exact)
    assert twin is not None and {id(p) for p in twin.parameters()} == {id(p) for p in network.parameters()}
    for one, other in ((network.blocks, twin.blocks), (network.control[0].blocks, twin.control[0].blocks)):
        assert all(block.attend == Fp8() for block in one) and all(block.attend is exact for block in other)


@dataclass(frozen=True)
class Bound:
    network: Any
    ctx: Any

    def __call__(self, z: Tensor, step: int) -> Any:
        return self.network, step


@pytest.mark.parametrize(
    ("head", "tail", "full"),
    [(0.2, 0.1, {0, 1, 9}), (0.0, 0.3, {7, 8, 9}), (0.04, 0.06, {9}), (0.5, 0.5, set(range(10)))],
)
def test_first_and_last_steps_are_the_twins(head: float, tail: float, full: set[int]) -> None:
    tables = types.SimpleNamespace(head=torch.zeros(10, 1))
    bound = Bound("fast", types.SimpleNamespace(tables=tables))
    recorded: list[Bound] = []

    def record(whole: Bound) -> Bound:
        recorded.append(whole)
        return whole

    recipe = Recipe(attention="fp8", attention_head=head, attention_tail=tail)
    assert scheduled(bound, None, recipe, record) is bound
    run = scheduled(bound, "full", recipe, record)
    took = [run(torch.zeros(1), step) for step in range(10)]
    assert [name for name, _ in took] == ["full" if step in full else "fast" for step in range(10)]
    assert [step for _, step in took] == list(range(10))
    assert [whole.network for whole in recorded] == ["fast", "fast", "full"]


def test_a_clip_in_8_bits_is_another_but_nearly_the_same(models: Path, tmp_path: Path) -> None:
    from system import clip_of, open_engine, request

    spec = request(clip_of(tmp_path / "street.mp4", 5), num_video_frames_per_chunk=1)

    def made(recipe: Recipe) -> Any:
        return open_engine(models, "edge", recipe=recipe).generate(spec).frames.astype(float)

    exact = made(Recipe.fp32())
    eight = made(Recipe(name="eight", dtype="fp32", attention="fp8"))
    full = made(Recipe(name="full", dtype="fp32", attention="fp8", attention_head=1.0))
    # So small a picture has one tile of keys, and the best one is always kept.
    sparse = made(
        Recipe(name="sparse", dtype="fp32", attention="fp8", attention_share=0.1, attention_mass=0.1)
    )
    assert 0 < abs(eight - exact).mean() < 4 and abs(full - exact).max() == 0
    assert 0 < abs(sparse - exact).mean() < 4


def test_a_recipe_that_keeps_fewer_tiles_attends_over_lists() -> None:
    cpu = torch.device("cpu")
    assert fp8(cpu) == Fp8()
    assert fp8(cpu, 0.5) == SparseFp8(0.5, 1.0) and fp8(cpu, mass=0.9) == SparseFp8(1.0, 0.9)


def test_info_names_what_it_would_use_and_why() -> None:
    from cosmos_fast.dispatch import explain

    rows = {op: (chosen, others) for op, chosen, others in explain("cpu", torch.bfloat16)}
    chosen, others = rows["attention_fp8"]
    assert chosen == "emulated" and others["fa3"] == others["cudnn"] == "needs a cuda tensor"
    assert ops.EPS and rows["qkv_codes"][0] == "reference"
