"""The presets of train_gpt2.py: the settings that each model size or recipe changes.

    python train_gpt2.py --preset=modern

Nothing here imports torch, so that --help answers at once.
"""

# NanoChat, with the recipe of modded-nanogpt and nanochat; docs/modern.md has the sources.
MODERN = {
    "pos": "rope", "norm": "rmsnorm_noaffine", "mlp": "relu2", "qk_norm": True, "bias": False,
    "embd_norm": True, "softcap": 15.0, "zero_init": True, "tie_embeddings": False,
    "optimizer": "muon", "schedule": "wsd", "min_lr": 0.0, "beta1": 0.8,
}  # fmt: skip

# Sizes from the GPT-2 paper; learning rates from the GPT-3 paper (table 2.1) for the nearest size.
PRESETS = {
    "tiny": {
        **MODERN, "softcap": 0.0, "zero_init": False, "n_layer": 3, "n_head": 2, "n_embd": 128,
        "B": 16, "T": 128, "total_batch_size": 2048, "max_steps": 1250, "warmup_steps": 20,
        "cooldown_steps": 1125, "max_lr": 7e-3, "beta2": 0.99, "hellaswag_every": 0,
        "ewok_every": 0, "eval_every": 625, "save_every": 625, "sample_every": 625,
        "sample_prompt": "\n", "sample_tokens": 160, "print_every": 25,
    },
    "modern": {
        **MODERN, "n_head": 6, "max_lr": 3.6e-3, "warmup_steps": 40, "cooldown_steps": 11_444,
        "weight_decay": 0.04,
    },
    "gpt2": {},
    "gpt2-medium": {
        "n_layer": 24, "n_head": 16, "n_embd": 1024, "B": 32, "max_lr": 3e-4, "min_lr": 3e-5,
    },
    "gpt2-large": {
        "n_layer": 36, "n_head": 20, "n_embd": 1280, "B": 16, "max_lr": 2.5e-4, "min_lr": 2.5e-5,
    },
    "gpt2-xl": {
        "n_layer": 48, "n_head": 25, "n_embd": 1600, "B": 8, "max_lr": 2e-4, "min_lr": 2e-5,
    },
}  # fmt: skip
