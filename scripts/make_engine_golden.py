#!/usr/bin/env python3
"""Makes what the engine tests compare with: tiny random models and logits of Hugging Face transformers.

    python3 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch transformers safetensors gguf    (torch's CPU build will do)
    /tmp/venv/bin/python scripts/make_engine_golden.py tiny
    /tmp/venv/bin/python scripts/make_engine_golden.py rope
    /tmp/venv/bin/python scripts/make_engine_golden.py default --gguf SmolLM2-135M-Instruct.Q4_1.gguf

`tiny` writes tests/golden/engine/<name>/{config.json,model.safetensors,golden.json}; `rope` writes
tests/golden/engine/rope.json, inverse frequencies and magnitudes of many RoPE settings; `default` writes
tests/golden/engine/smollm2-135m-q4_1.json from the weights of the file, expanded to fp32 by the `gguf` package; its
text is the beginning of Debian's `bible-kjv`. All arithmetic is fp32 with plain ("eager") attention. Seeded.

A golden.json holds `tokens`, `positions`, `ids` (of the vocabulary), `logits` [positions][ids] and `largest`: by
position the largest magnitude over the whole vocabulary, the measure of a relative error.
"""
import argparse
import json
import pathlib
import subprocess

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/engine"
SEED = 3
PROMPT = 512

# ---- tiny models -------------------------------------------------------------------------------

BASE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def rope(kind="default", theta=10000.0, **rest):
    return {"rope_type": kind, "rope_theta": theta, **rest}


def factors(low, high, count=4):
    return [round(low + (high - low) * i / (count - 1), 4) for i in range(count)]


TINY = {
    "mha": ("llama", "F32", {"num_key_value_heads": 4, "rope_parameters": rope()}),
    "gqa": ("llama", "BF16", {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True,
                              "rope_parameters": rope(theta=500000.0)}),
    "mistral": ("mistral", "F16", {"sliding_window": None, "head_dim": 16, "rope_parameters": rope()}),
    "qwen2-bias": ("qwen2", "BF16", {"rope_parameters": rope(theta=1000000.0)}),
    "qwen3-qk-norm": ("qwen3", "BF16", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": rope()}),
    "linear": ("llama", "BF16", {"rope_parameters": rope("linear", factor=4.0)}),
    "llama3": ("llama", "F16", {"rope_parameters": rope(
        "llama3", theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=128)}),
    "yarn": ("llama", "BF16", {"rope_parameters": rope(
        "yarn", theta=500.0, factor=8.0, original_max_position_embeddings=128)}),
    "yarn-mscale": ("llama", "BF16", {"rope_parameters": rope(
        "yarn", theta=500.0, factor=8.0, original_max_position_embeddings=128, beta_fast=16.0, beta_slow=2.0,
        mscale=1.0, mscale_all_dim=0.5, truncate=False)}),
    # Trained on 256, asked for 512: the frequencies are those of the longer sequence.
    "dynamic": ("llama", "BF16", {"max_position_embeddings": 256, "rope_parameters": rope("dynamic", factor=4.0)}),
    "longrope": ("llama", "BF16", {"rope_parameters": rope(
        "longrope", factor=4.0, original_max_position_embeddings=256, short_factor=factors(1.0, 1.5),
        long_factor=factors(1.0, 4.0))}),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def randomise(model, dtype):
    """Weights that make every part matter: sharp attention, norms and biases far from 1 and 0."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.3 * noise
            elif p.ndim == 1:
                value = 0.5 * noise
            elif "embed" in name or "lm_head" in name:
                value = 0.5 * noise
            else:
                value = noise * 1.2 / p.shape[1] ** 0.5
            p.copy_(value.to(dtype).float())


def run(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def golden(tokens, logits, positions, ids):
    rows = [[float(f"{logits[p][i]:.6g}") for i in ids] for p in positions]
    largest = [float(f"{np.abs(logits[p]).max():.6g}") for p in positions]
    return {"tokens": tokens, "positions": positions, "ids": ids, "largest": largest, "logits": rows}


def write_json(path, value):
    text = json.dumps(value, separators=(",", ":")).replace("],[", "],\n[").replace(',"', ',\n"')
    path.write_text(text + "\n")


def make_tiny(name, kind, dtype, changes):
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(kind, **{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, DTYPES[dtype])
    tokens = torch.randint(0, BASE["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(SEED + 1)).tolist()
    logits = run(model, tokens)
    directory = GOLDEN / name
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(DTYPES[dtype]).contiguous() for k, v in model.state_dict().items()
               if not (k == "lm_head.weight" and config.tie_word_embeddings)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads(config.to_json_string())
    text["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
    positions = [0, 1, 17, 200, 255, 256, 500, 511]
    write_json(directory / "golden.json", golden(tokens, logits, positions, list(range(BASE["vocab_size"]))))
    spread = float(np.abs(logits[511] - logits[500]).max() / np.abs(logits[511]).max())
    print(f"{name}: {kind} {dtype}, largest logit {np.abs(logits).max():.3f}, spread between positions {spread:.2f}")


# ---- RoPE --------------------------------------------------------------------------------------

ROPE_CASES = [  # head_dim, max_positions, length of the sequence, settings
    (64, 8192, 1, rope(theta=100000.0)),
    (96, 4096, 1, rope("linear", factor=3.0)),
    (128, 131072, 1, rope("llama3", theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=8192)),
    (64, 131072, 1, rope("llama3", theta=500000.0, factor=32.0, low_freq_factor=2.0, high_freq_factor=6.0,
                         original_max_position_embeddings=4096)),
    (128, 131072, 1, rope("yarn", theta=1000000.0, factor=4.0, original_max_position_embeddings=32768)),
    (64, 65536, 1, rope("yarn", factor=16.0, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=3.0)),
    (64, 65536, 1, rope("yarn", factor=16.0, original_max_position_embeddings=4096, truncate=False)),
    (64, 65536, 1, rope("yarn", factor=16.0, original_max_position_embeddings=4096, mscale=0.7, mscale_all_dim=1.2)),
    (64, 65536, 1, rope("yarn", factor=16.0, original_max_position_embeddings=4096, attention_factor=0.9)),
    (64, 2048, 1000, rope("dynamic", factor=4.0)),
    (64, 2048, 2049, rope("dynamic", factor=4.0)),
    (64, 2048, 7000, rope("dynamic", factor=4.0)),
    (32, 32768, 4096, rope("longrope", factor=8.0, original_max_position_embeddings=4096,
                           short_factor=factors(1.0, 1.3, 16), long_factor=factors(1.0, 40.0, 16))),
    (32, 32768, 4097, rope("longrope", factor=8.0, original_max_position_embeddings=4096,
                           short_factor=factors(1.0, 1.3, 16), long_factor=factors(1.0, 40.0, 16))),
    (32, 32768, 4097, rope("longrope", factor=8.0, original_max_position_embeddings=4096, attention_factor=1.1,
                           short_factor=factors(1.0, 1.3, 16), long_factor=factors(1.0, 40.0, 16))),
]


def make_rope():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    cases = []
    for head_dim, max_positions, length, settings in ROPE_CASES:
        config = AutoConfig.for_model("llama", hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                                      max_position_embeddings=max_positions, rope_parameters=dict(settings))
        kind = settings["rope_type"]
        if kind == "default":
            inverse, magnitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inverse, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        cases.append({"head_dim": head_dim, "max_positions": max_positions, "length": length, **settings,
                      "inverse": [float(f"{x:.9g}") for x in inverse.tolist()], "magnitude": float(magnitude)})
    write_json(GOLDEN / "rope.json", cases)
    print(f"rope: {len(cases)} settings")


# ---- the default model ---------------------------------------------------------------------------

GGUF_NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def halves(weight, heads):
    """Rows of pairs (2i, 2i + 1), as the llama architecture of GGUF has them, to pairs (i, i + d / 2)."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def read_gguf(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize
    reader = GGUFReader(path)
    field = lambda key: reader.fields["llama." + key].contents()
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "token_embd":
            name = "model.embed_tokens.weight"
        elif parts[0] == "output_norm":
            name = "model.norm.weight"
        else:
            name = f"model.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.weight"
            if parts[2] in ("attn_q", "attn_k"):
                value = halves(value, heads if parts[2] == "attn_q" else kv_heads)
        state[name] = torch.from_numpy(np.ascontiguousarray(value))
    config = AutoConfig.for_model(
        "llama", vocab_size=state["model.embed_tokens.weight"].shape[0], hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"), num_hidden_layers=field("block_count"),
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"), tie_word_embeddings=True,
        rope_parameters=rope(theta=float(field("rope.freq_base"))))
    return config, state


def make_default(path):
    from transformers import AutoTokenizer
    path = pathlib.Path(path)
    config, state = read_gguf(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["lm_head.weight"], (missing, unexpected)
    model.tie_weights()
    text = subprocess.run(["bible", "-f", "gen1:1-gen3:24"], check=True, capture_output=True, text=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = tokenizer(text)["input_ids"][:PROMPT]
    logits = run(model, tokens)
    rng = np.random.default_rng(SEED)
    ids = set(rng.choice(config.vocab_size, 900, replace=False).tolist())
    positions = [0, 1, 63, 127, 255, 256, 383, 499, 500, 501, 505, 511]
    for p in positions:
        ids.update(np.argsort(-logits[p])[:8].tolist())
    write_json(GOLDEN / "smollm2-135m-q4_1.json", golden(tokens, logits, positions, sorted(ids)))
    print(f"default: {len(ids)} ids x {len(positions)} positions, largest logit {np.abs(logits).max():.2f}")
    print("continues with", repr(tokenizer.decode([int(logits[511].argmax())])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tiny", "rope", "default"])
    parser.add_argument("--gguf", help="the default model, SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "tiny":
        for name, (kind, dtype, changes) in TINY.items():
            make_tiny(name, kind, dtype, changes)
    elif arguments.what == "rope":
        make_rope()
    else:
        if not arguments.gguf:
            parser.error("default needs --gguf FILE")
        make_default(arguments.gguf)


if __name__ == "__main__":
    main()
