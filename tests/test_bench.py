"""`bench.py` times equal work: our step and the plain loop's move the weights alike, and its JSON
holds what it promises."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import lm


def moved(model, before):
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before)])


def test_ours_and_the_plain_loop_take_the_same_step(monkeypatch):
    """From the same rollouts, with plain SGD in AdamW's place, which would blow rounding up to a
    step."""
    B, P, T, G, V = 2, 6, 5, 3, 50
    prompts, z = bench.make_work(B, P, V)
    rows = torch.randint(1, V, (B * G, T), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda params, lr, **_: torch.optim.SGD(params, lr=lr)
    )
    changes = []
    for contestant in (bench.ours, bench.plain):
        policy, ref, Q = (bench.make_model(64, 2, V, seed) for seed in range(3))
        before = [p.detach().clone() for p in policy.parameters()]
        logps = lm.logprobs(
            policy, prompts, rows.tolist(), [n // G for n in range(B * G)], lm.Options(-1)
        ).tolist()
        monkeypatch.setattr(lm, "sample", lambda *_: (rows.tolist(), logps))
        policy.generate = lambda ids, **_: torch.cat([ids.repeat_interleave(G, 0), rows], 1)
        contestant(policy, ref, Q, prompts, z, T=T, G=G)()
        changes.append(moved(policy, before))
    assert changes[0].norm() > 0 and (changes[0] - changes[1]).norm() < 1e-3 * changes[0].norm()


@pytest.mark.slow
def test_a_race_in_small(tmp_path):
    assert (
        bench.main(
            ["--cases", "tools-P40-T41-G16", "--repeats", "1", "--json", str(tmp_path / "b.json")]
        )
        == 0
    )
    found = json.loads((tmp_path / "b.json").read_text())
    case, = found["cases"]
    assert (
        found["gemm_gflops"] > 0
        and 0 < found["policy_pass_gemm_share"] < 1
        and case["name"] == "tools-P40-T41-G16"
    )
    for name in ("ours", "plain"):
        assert set(case[name]) == {
            "cpu_s_min",
            "cpu_s_median",
            "wall_s_min",
            "wall_s_median",
            "peak_mb_above_models",
        }
        assert 0 < case[name]["cpu_s_min"] <= case[name]["cpu_s_median"]
    assert case["ratio_plain"] == pytest.approx(
        case["plain"]["cpu_s_min"] / case["ours"]["cpu_s_min"]
    )
    assert (case["trl"] is None) == (case["ratio_trl"] is None)


def test_forward_flop_agrees_with_torch():
    # so short that attention, which torch does not count, is little
    B, P, T, G, width, layers, V = 2, 8, 8, 16, 128, 2, 500
    model, (prompts, _) = bench.make_model(width, layers, V), bench.make_work(B, P, V)
    rows, owner = torch.randint(1, V, (B * G, T)).tolist(), [n // G for n in range(B * G)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.logprobs(model, prompts, rows, owner, lm.Options(-1))
    assert counter.get_total_flops() == pytest.approx(
        bench.forward_flop(B, P, T, N=B * G, width=width, layers=layers, V=V, scored=B * G * T),
        rel=0.03,
    )


def test_attended_pairs_are_those_of_a_causal_mask():
    B, P, T, N = 3, 40, 30, 12
    # a token itself, or half of it: no matter
    pairs = B * sum(p for p in range(P)) + N * sum(P + t for t in range(T))
    flop = lambda width: (
        bench.forward_flop(B, P, T, N, width=width, layers=1, V=7, scored=0)
        - 2 * 13 * width**2 * (B * P + N * T)
    )
    assert flop(64) == pytest.approx(4 * 64 * pairs, rel=0.03)
