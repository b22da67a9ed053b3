"""The gradient of our update against TRL's, on the same rollouts, rewards and reference. Skipped
where TRL is not installed."""
import pytest
import torch
from conftest import EOS, Net, Recorder, grads, relative, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import grpo
import lm

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

V, G, T = 9, 3, 5
PROMPTS = [[3, 1, 4, 1, 5], [2, 7]]
# ragged; one without an end
ROWS = [[6, 2, EOS], [8, 3, 5, 7, EOS], [1, EOS], [4, 4, EOS], [5, 6, 7, 8, 1], [2, EOS]]
R = [0.3, -1.2, 0.8, -0.1, 2.0, -0.7]


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen = grads(model)


@pytest.mark.parametrize("scale", ["mean", "std"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradient_equals_that_of_trl(tmp_path, beta, scale):
    tiny_llama(V, 2).save_pretrained(tmp_path / "ref")
    load = lambda: LlamaForCausalLM.from_pretrained(tmp_path / "ref", dtype=torch.float32).eval()
    ref, ours, theirs = load(), load(), load()
    torch.manual_seed(0)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters()):
            # the policy is not the reference
            a += 0.05 * torch.randn_like(a)
            b.copy_(a)

    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")
    at = [" ".join(map(str, p)) for p in PROMPTS]
    # whatever TRL's order
    place = lambda prompts: [at.index(p) * G + prompts[:n].count(p) for n, p in enumerate(prompts)]
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=1,
        per_device_train_batch_size=len(ROWS),
        num_generations=G,
        max_completion_length=T,
        beta=beta,
        scale_rewards={"mean": "none", "std": "group"}[scale],
        loss_type="dr_grpo",
        temperature=1.0,
        use_bias_correction_kl=False,
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    gradient = Gradient()
    trl.GRPOTrainer(
        model=theirs,
        args=args,
        processing_class=tok,
        callbacks=[gradient],
        train_dataset=datasets.Dataset.from_dict({"prompt": at}),
        reward_funcs=lambda prompts, **_: [R[n] for n in place(prompts)],
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [PROMPTS[at.index(p)] for p in prompts],
            "logprobs": None,
            "completion_ids": [ROWS[n] for n in place(prompts)],
        },
    ).train()

    owner, recorder, options = [n // G for n in range(len(ROWS))], Recorder(ours), lm.Options(EOS)
    phase = grpo.Phase(group_size=G, beta=beta, kl="loss", scale=scale, max_norm=1e9)
    drawn = [
        row[: len(ids)]
        for row, ids in zip(lm.score_tokens(ours, PROMPTS, ROWS, owner, options).tolist(), ROWS)
    ]
    rollouts = grpo.Rollouts(PROMPTS, ROWS, drawn, options)
    rewards = torch.tensor(R).view(-1, G)
    grpo.step(Net(ours), Net(ref), [recorder], rollouts, R=rewards, phase=phase, lr=1.0)
    # dr_grpo also divides by the longest row
    assert relative(recorder.seen[0] / T, gradient.seen) < 1e-5
