"""LoRA (Hu et al. 2021) by the optional package peft: P, Q and their references are adapters of one
frozen base model.

Claim: each adapted matrix is W + (alpha / r) B A with W frozen and shared; A (r, in) and B (out, r)
are all that an adapter owns, so a second model or a reference costs its A and B and
not another W. `train.py --lora r` asks for it; everything else sees an `Adapter` where it saw a
model.

    python -m models.adapters --lora 32      what a phase needs on a 24, 48 and 80 GB card

peft builds the layers and computes them. Departures from how it is commonly used, and from full
fine-tuning:
1. peft holds one set of A and B, a placeholder. An adapter's own tensors stand in its place during
   a forward, and only then (`functional_call`). There is no active adapter to forget, and none
   whose requires_grad a switch would change: autograd passes over a leaf that is frozen when the
   gradient arrives, so P forward, Q forward, P backward would lose P's gradient.
2. For the same reason nothing may be computed again in the backward pass: no activation
   checkpointing (`lm.prefill` checks); and nothing else may put tensors in place of A and B (FSDP
   would; copies of the model on several cards do not).
3. All linear layers but the output's are adapted; alpha = 2 r; no dropout; A and B are float32
   whatever the base is.
4. P and Q start with one A and with B = 0, which is the base itself.
5. A saved folder holds the merged weights, which load without peft, and in adapter/ the A and B as
   peft reads them: a run resumes from these, on the base that --model names. In bfloat16 the merge
   rounds as W does; adapter/ does not.
"""

import argparse
import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Qwen2Config

from support import rundir

CARDS = 24, 48, 80                                                                 # GiB
# Qwen2.5
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864), "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008)}
SCALE = 2.0                                                                        # alpha / r


def pair(base, r):
    """(P, Q): two adapters of rank r on `base`, which is changed in place and frozen. One line and
    exit 2 if peft is missing."""
    try:
        import peft
    except ImportError:
        rundir.fail("--lora needs the package peft: pip install peft")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=SCALE * r,
        lora_dropout=0.0,
        target_modules="all-linear",
        base_model_name_or_path=base.name_or_path or None,
    )
    base = peft.inject_adapter_in_model(config, base).eval().requires_grad_(False)
    weights = {
        n: p.detach().to(torch.float32, copy=True)
        for n, p in base.named_parameters()
        if ".lora_" in n
    }
    P = Adapter(base, config, weights).requires_grad_(True)
    return P, copy.deepcopy(P)


class Adapter:
    """What the rest of the code uses of a model, for one set of A and B. `parameters` are A and B
    alone."""

    def __init__(self, base, config, weights):
        self.base, self.peft_config = base, config
        self.weights = {n: torch.nn.Parameter(w, requires_grad=False) for n, w in weights.items()}

    def __call__(self, *args, **kwargs):
        return functional_call(self.base, self.weights, args, kwargs, tie_weights=False)

    def __getattr__(self, name):
        if name in (
            "config",
            "device",
            "dtype",
            "training",
            "is_activation_checkpointing",
            "num_parameters",
        ):
            return getattr(self.base, name)
        raise AttributeError(f"an Adapter has no {name}")

    def __deepcopy__(self, memo):
        """Its own A and B, on the same base: `lm.frozen` makes a reference of it."""
        other = Adapter(
            self.base, self.peft_config, {n: p.detach().clone() for n, p in self.weights.items()}
        )
        for a, b in zip(other.parameters(), self.parameters()):
            a.requires_grad_(b.requires_grad)
        return other

    def parameters(self):
        return list(self.weights.values())

    def named_parameters(self):
        return list(self.weights.items())

    def state_dict(self):
        return {n: p.detach() for n, p in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """In place, so that an optimizer keeps its parameters. ValueError if it is not of an
        adapter like this one."""
        if {n: p.shape for n, p in self.weights.items()} != {n: w.shape for n, w in state.items()}:
            raise ValueError("these are not the A and B of an adapter of this base and rank")
        for n, p in self.weights.items():
            p.copy_(state[n])

    def requires_grad_(self, on=True):
        for p in self.weights.values():
            p.requires_grad_(on)
        return self

    def eval(self):
        # the base never leaves it
        return self

    def to(self, device):
        self.base.to(device)
        for p in self.weights.values():
            p.data = p.data.to(device)
        return self

    def merged(self):
        """{name in the base before peft: W + alpha / r B A}, in W's dtype, on the CPU."""
        out = {}
        for name, W in self.base.state_dict().items():
            if ".lora_" not in name:
                layer, adapted, leaf = name.partition(".base_layer.")
                W = W.cpu()
                if adapted and leaf == "weight":
                    A, B = (
                        self.weights[f"{layer}.lora_{x}.default.weight"].detach().cpu()
                        for x in "AB"
                    )
                    module = self.base.get_submodule(layer)
                    BA = B @ A * module.scaling["default"]                         # (out, in)
                    W = (W.float() + (BA.T if module.fan_in_fan_out else BA)).to(W.dtype)
                out[layer + "." + leaf if adapted else name] = W
        return out

    def save_pretrained(self, folder):
        """Departure 5."""
        self.base.save_pretrained(folder, state_dict=self.merged())
        self.peft_config.save_pretrained(Path(folder) / "adapter")
        save_file(
            {
                "base_model.model." + n.replace(".default", ""): p.detach().contiguous()
                for n, p in self.weights.items()
            },
            Path(folder) / "adapter" / "adapter_model.safetensors",
        )

    def load(self, folder):
        """Take up the A and B that `save_pretrained` left in folder/adapter."""
        saved = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
        self.load_state_dict(
            {
                n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): w
                for n, w in saved.items()
            }
        )


# --- what fits on a card --------------------------------------------------------------------------

# Bytes that autograd keeps for a token in a layer of a Llama or Qwen, per unit of hidden and of
# intermediate size (counted by saved_tensors_hooks): (products in bfloat16, LoRA)
KEPT = {
    (False, False): (42, 16), (False, True): (34, 16), (True, False): (36, 8),
    (True, True): (29, 8)}


def memory(config, r=0, half=False):
    """(parts, token): bytes at the peak of a phase, without loading weights, for rank r or, if 0,
    for full fine-tuning; half: products in bfloat16 (`lm.Options.half`). parts {"weights" (float32;
    if half, cast once more or, with LoRA, bfloat16 alone), "gradients", "optimizer" (AdamW's m and
    v), "opposite", "reference"}. token: activations per token of a micro-batch, of which every one
    is scored: KEPT in each layer; the logits, three times in float32 and, if half, once more. The
    peak is sum(parts) + max(tokens * token, gradients): a weight's gradient waits, apart, until the
    shared prefix has added its own. Attention is assumed to keep no scores (sdpa, but for its math
    fallback); the keys of a sampler are not counted. tests/test_lora.py holds it to 15 % of a
    process's peak."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    n = model.num_parameters()
    h, i = KEPT[half, r > 0]
    config = config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    token = (
        config.num_hidden_layers * (h * config.hidden_size + i * inner)
        + (14 if half else 12) * config.vocab_size
    )
    if not r:
        return dict(
            weights=n * (6 if half else 4),
            gradients=4 * n,
            optimizer=8 * n,
            opposite=4 * n,
            reference=4 * n,
        ), token
    k = sum(r * sum(m.weight.shape) for m in model.modules()
            if type(m).__name__ in ("Linear", "Conv1D") and m is not model.get_output_embeddings())
    return dict(
        weights=n * (2 if half else 4) + 4 * k,
        gradients=4 * k,
        optimizer=8 * k,
        opposite=4 * k,
        reference=4 * k,
    ), token


def shape(hidden, layers, heads, kv, intermediate, vocab_size=151936):
    """The config of a Qwen2.5 of these sizes."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="What a phase needs on a card, full fine-tuning against LoRA."
    )
    parser.error = rundir.fail
    parser.add_argument("--lora", type=int, default=32, help="rank [32]")
    r = parser.parse_args(argv).lora
    if r < 1:
        rundir.fail(f"--lora cannot be {r} here; give a rank, such as 32")
    print(
        "GiB at the peak of a phase, and the most tokens that a micro-batch may have beside it (90 "
        "% of the card is used)\n"
        f"{'':24}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'others':>8}{'sum':>8}"
        f"{'MiB/token':>11}"
        + "".join(f"{card:>9} GB" for card in CARDS)
    )
    for name in QWEN:
        config = shape(*QWEN[name])
        for way, rank, half in (("full, float32", 0, False), ("full, bfloat16", 0, True),
                                (f"LoRA {r}, float32", r, False), (f"LoRA {r}, bfloat16", r, True)):
            parts, token = memory(config, rank, half)
            total = sum(parts.values())
            room = [.9 * card * 2**30 - total for card in CARDS]
            others = parts["opposite"] + parts["reference"]
            print(
                f"{name + ' ' + way:24}"
                + "".join(
                    f"{value / 2**30:{w}.2f}"
                    for value, w in (
                        (parts["weights"], 9),
                        (parts["gradients"], 11),
                        (parts["optimizer"], 11),
                        (others, 8),
                        (total, 8),
                    )
                )
                + f"{token / 2**20:11.2f}"
                + "".join(
                    f"{int(n // token) if n > parts['gradients'] else 'none':>12}" for n in room
                )
            )


if __name__ == "__main__":
    main()
