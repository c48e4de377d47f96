"""Published sizes that benchmarks run on random weights; the tiny ones are for a quick look."""

from core.config import ModelConfig

PRESETS = {
    "tiny": ModelConfig("gpt2", 5000, 1024, 256, 4, 4, 1024, 64),
    "gemma3-tiny": ModelConfig(
        "gemma3", 16_384, 2048, 256, 4, 4, 1024, 64, norm_eps=1e-6, kv_heads=1, rope_theta=1e6,
        window=512, sliding=(True, True, True, True),
    ),
    "gpt2-124m": ModelConfig("gpt2", 50257, 1024, 768, 12, 12, 3072, 64),
    "gemma3-270m": ModelConfig(
        "gemma3", 262_144, 32_768, 640, 18, 4, 2048, 256, norm_eps=1e-6, kv_heads=1,
        rope_theta=1e6, rope_theta_local=1e4, window=512, query_scale=256**-0.5,
        sliding=tuple((layer + 1) % 6 != 0 for layer in range(18)),
    ),
    "pythia-160m": ModelConfig(
        "gpt_neox", 50_304, 2048, 768, 12, 12, 3072, 64, activation="gelu", tied=False,
        rotary_dim=16,
    ),
}  # fmt: skip
