#!/usr/bin/env python3
"""Makes the seeds of the fuzz targets under tests/fuzz/corpus.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install gguf safetensors numpy
    /tmp/venv/bin/python scripts/make_fuzz_corpus.py

Small files of every shape that the readers know. Inputs that found a fault are kept beside them as found-*.
"""
import json
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/fuzz/corpus"
GOLDEN = ROOT / "tests/golden"
RNG = np.random.default_rng(40)
SHAPE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=8, max_position_embeddings=64)


def folder(name):
    path = CORPUS / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def small(shape):
    return RNG.normal(0, 0.1, shape).astype(np.float32)


def gguf_file(name, arch, tokenizer, kind, bias=False, qk_norm=False):
    writer = gguf.GGUFWriter(folder("gguf") / name, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_context_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if arch == "qwen2":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_tokenizer_model(tokenizer)
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u0120", "c"]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    if tokenizer == "llama":
        writer.add_token_scores([-float(i) for i in range(8)])
    else:
        writer.add_tokenizer_pre("smollm" if arch == "llama" else "qwen2")
        writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("<|im_start|>system\nhello<|im_end|>")

    def add(tensor, shape):
        values = small(shape)
        if len(shape) == 1 or kind is None:
            writer.add_tensor(tensor, values)
        else:
            writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (8, 32))
    add("output_norm.weight", (32,))
    for part, shape in [("attn_norm", (32,)), ("ffn_norm", (32,)), ("attn_q", (32, 32)), ("attn_k", (16, 32)), ("attn_v", (16, 32)),
                        ("attn_output", (32, 32)), ("ffn_gate", (32, 32)), ("ffn_up", (32, 32)), ("ffn_down", (32, 32))]:
        add(f"blk.0.{part}.weight", shape)
    if bias:
        for part, n in [("attn_q", 32), ("attn_k", 16), ("attn_v", 16)]:
            add(f"blk.0.{part}.bias", (n,))
    if qk_norm:
        for part in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.0.{part}.weight", (16,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf():
    gguf_file("llama-f16.gguf", "llama", "gpt2", gguf.GGMLQuantizationType.F16)
    gguf_file("llama-q8.gguf", "llama", "llama", gguf.GGMLQuantizationType.Q8_0)
    gguf_file("qwen2-q4.gguf", "qwen2", "gpt2", gguf.GGMLQuantizationType.Q4_1, bias=True)
    gguf_file("qwen3-f32.gguf", "qwen3", "gpt2", None, qk_norm=True)


def write_safetensors():
    out = folder("safetensors")
    half = small((4,)).astype(np.float16)
    (out / "two.safetensors").write_bytes(save({"a": small((2, 3)), "b": half}, metadata={"format": "pt"}))
    (out / "mixed.safetensors").write_bytes(save({"x": np.arange(3, dtype=np.int64), "y": np.ones((3, 1), np.uint8), "z": small((1,))}))
    (out / "none.safetensors").write_bytes(save({}))


def write_configs():
    out = folder("config")
    rope = {"linear": {"rope_type": "linear", "factor": 2.0},
            "dynamic": {"type": "dynamic", "factor": 2.0},
            "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.1, "truncate": False},
            "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 16, "rope_theta": 5e5},
            "longrope": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}}
    for name, parameters in rope.items():
        key = "rope_parameters" if "rope_type" in parameters else "rope_scaling"
        config = dict(SHAPE, model_type="llama", head_dim=16, eos_token_id=[2, 7], tie_word_embeddings=True, attention_bias=True)
        (out / f"llama-{name}.json").write_text(json.dumps({**config, key: parameters}))
    (out / "mistral.json").write_text(json.dumps(dict(SHAPE, model_type="mistral", sliding_window=16, rope_theta=1e6)))
    (out / "qwen2.json").write_text(json.dumps(dict(SHAPE, model_type="qwen2", use_sliding_window=True, sliding_window=16,
                                                    max_window_layers=0, layer_types=["sliding_attention"])))
    (out / "qwen3.json").write_text(json.dumps(dict(SHAPE, model_type="qwen3", head_dim=None, eos_token_id=2)))
    (out / "overrides.json").write_text('{"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}, "max_position_embeddings": 196608}')
    (out / "adapter.json").write_text((GOLDEN / "loader/lora/adapter_config.json").read_text())


def write_tokenizers():
    out = folder("tokenizer")
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "a", "b", "\u0120", "\u2581", "ab", "\u0120a", "\u2581a"])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    for name in ("gpt2", "llama3", "qwen2", "llama2", "mistral"):
        spec = json.loads((GOLDEN / f"tokenizers/{name}.tokenizer.json").read_text())
        spec["model"]["vocab"] = dict(vocab)
        spec["model"]["merges"] = [["a", "b"], ["\u2581", "a"] if name in ("llama2", "mistral") else ["\u0120", "a"]]
        for i, token in enumerate(spec["added_tokens"]):
            token["id"] = vocab.get(token["content"], 10 + i)
        (out / f"{name}.json").write_text(json.dumps(spec, ensure_ascii=False))
    smol = {"model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]}, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
            "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 11, "content": " x ", "lstrip": True, "rstrip": True, "normalized": True}]}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
              "chat_template": [{"name": "default", "template": "[INST]"}]}
    (out / "smollm2.json").write_text(json.dumps(smol, ensure_ascii=False) + "\0" + json.dumps(config))


def write_calibrations():
    out = folder("calibration")
    head = "a protected head drops more than 0.05 of its attention mass at a decode step drawn at random"
    good = {"schema": "prehoc.calibration/1", "model": {"fingerprint": "0123456789abcdef" * 4, "name": "tiny"},
            "text": {"path": "verses.txt", "sha256": "fedcba9876543210" * 4},
            "selector": {"name": "window", "knobs": ["selector=window", "budget=1/16", "budget.sinks=8", "budget.local=32"],
                         "codes": "4/64"},
            "calibrated": {"knob": "budget", "value": "1/16"}, "method": "rcps", "alpha": 0.05, "confidence": 0.9,
            "delta_max": 0.05, "units": 500, "violations": 0, "upper_limit": 1 - 0.1 ** (1 / 500),
            "unprotected": ["0.3"],
            "guarantee": f"with confidence 0.9 over the calibration requests, in at most 0.05 of requests like them {head}",
            "prompt_tokens": {"from": 512, "to": 8192}}
    average = dict(good, method="conformal", confidence=None, units=99, violations=1, upper_limit=0.02, guarantee=(
        f"on average over calibration requests and the next one like them, with probability at most 0.05 {head}"))
    seeds = {"good": good, "conformal": average, "next-schema": dict(good, schema="prehoc.calibration/2"),
             "hostile-number": dict(good, upper_limit=1e300, units=2**63), "control": dict(good, method="\x1b[2J\n"),
             "more-violations": dict(good, violations=40), "unknown": dict(good, more=[{}] * 3)}
    for name, value in seeds.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    (out / "missing").write_text(json.dumps({k: v for k, v in good.items() if k != "units"}))
    (out / "short").write_text(json.dumps(good)[:-40])
    (out / "twice").write_text(json.dumps(good)[:-1] + ', "units": 5}')


if __name__ == "__main__":
    write_gguf()
    write_safetensors()
    write_configs()
    write_tokenizers()
    write_calibrations()
