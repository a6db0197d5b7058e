#!/usr/bin/env python3
"""Makes what the model loader's tests compare with, under tests/golden/loader.

    python3 -m venv /tmp/venv
    /tmp/venv/bin/pip install torch transformers peft safetensors gguf --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/venv/bin/python scripts/make_loader_golden.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf]

Truth is not ours: the `gguf` package expands quantised blocks, PEFT merges a small adapter, and numpy merges rows of
bench/models/smollm2-135m-128k into the default model. Everything is seeded.
"""
import argparse
import json
import pathlib
import shutil
import tempfile

import gguf
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/loader"
ADAPTER = ROOT / "bench/models/smollm2-135m-128k"
SEED = 30
TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "F16", "BF16"]
# Where the scales of a block lie: any bytes are a legal block, but few are a finite half.
HALF_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}


def dequantize():
    rng = np.random.default_rng(SEED)
    out = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if name in HALF_AT:
            data = rng.integers(0, 256, (512 // block, size), dtype=np.uint8)
            for at in HALF_AT[name]:
                data[:, at:at + 2] = rng.normal(0, 0.1, (len(data), 1)).astype(np.float16).view(np.uint8)
            data = data.reshape(-1)
        else:
            values = rng.normal(0, 1, 512).astype(np.float32)
            data = values.astype(np.float16).view(np.uint8) if name == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        values = gguf.dequantize(data, kind).astype(np.float32).reshape(-1)
        assert values.shape == (512,) and np.isfinite(values).all()
        out[name] = {"bytes": data.tobytes().hex(), "floats": values.tobytes().hex()}
    (GOLDEN / "dequantize.json").write_text(json.dumps(out, indent=0) + "\n")


def peft_adapter(use_rslora):
    """Base, adapter and what PEFT merges them to, as directories of one name."""
    torch.manual_seed(SEED)
    name = "rslora" if use_rslora else "lora"
    base = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, vocab_size=64, max_position_embeddings=128,
                                        tie_word_embeddings=True))
    modules = ["q_proj", "v_proj"] if use_rslora else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(GOLDEN / "base")
        (GOLDEN / "base/generation_config.json").unlink()
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=modules, use_rslora=use_rslora,
                                                task_type="CAUSAL_LM"))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_(0, 0.1)
        model.save_pretrained(scratch)
        target = GOLDEN / name
        target.mkdir(exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(pathlib.Path(scratch) / file, target / file)
        again = LlamaForCausalLM.from_pretrained(GOLDEN / "base")
        merged = PeftModel.from_pretrained(again, target).merge_and_unload()
        merged.save_pretrained(GOLDEN / f"{name}-merged")
        (GOLDEN / f"{name}-merged/generation_config.json").unlink()


def default_model_rows(path):
    """Rows of the default model with the 128K adapter, each module in one layer, in the row order of the GGUF file."""
    rng = np.random.default_rng(SEED + 1)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    adapter = load_file(ADAPTER / "adapter_model.safetensors")
    modules = [("attn_q", "self_attn.q_proj", 9), ("attn_k", "self_attn.k_proj", 3), ("attn_v", "self_attn.v_proj", 0),
               ("attn_output", "self_attn.o_proj", 0), ("ffn_gate", "mlp.gate_proj", 0), ("ffn_up", "mlp.up_proj", 0),
               ("ffn_down", "mlp.down_proj", 0)]
    out = []
    for ours, theirs, heads in modules:
        layer = int(rng.integers(30))
        t = tensors[f"blk.{layer}.{ours}.weight"]
        w = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
        if heads:  # the file's rows back to Hugging Face's order: (head, pair, half) to (head, half, pair)
            w = w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        key = f"base_model.model.model.layers.{layer}.{theirs}"
        a, b = (adapter[f"{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        w = w + (32 / 16) * (b @ a)
        if heads:
            w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        for row in sorted(int(r) for r in rng.choice(len(w), 3, replace=False)):
            out.append({"layer": layer, "module": theirs, "row": row,
                        "values": [float(f"{x:.7g}") for x in w[row]]})
    text = ",\n".join(json.dumps(r, separators=(",", ":")) for r in out)
    (GOLDEN / "smollm2_128k_rows.json").write_text(f"[{text}]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", default=pathlib.Path.home() / ".cache/prehoc/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    dequantize()
    peft_adapter(use_rslora=False)
    peft_adapter(use_rslora=True)
    default_model_rows(args.gguf)


if __name__ == "__main__":
    main()
