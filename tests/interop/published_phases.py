"""CrystalCoder's three phase files (LLM360/crystalcoder-train, pretrain/params/phaseN/params.yaml), with every key that
they hold; paths and names of machines are shortened. The third was written by hand, the others by Model Zoo."""

import json
from pathlib import Path

import yaml

PHASES = json.loads((Path(__file__).parent / "crystalcoder-phases.json").read_text())

# what says what is trained; the model's is the same in all three
MODEL = {
    "attention_dropout_rate": 0.0, "attention_type": "scaled_dot_product", "dropout_rate": 0.0,
    "embedding_initializer": {"a": -0.146, "b": 0.146, "mean": 0.0, "name": "truncated_normal", "std": 0.073},
    "embeddings_scale": 14.6, "filter_size": 10922, "hidden_size": 4096,
    "initializer": {"a": -0.0365, "b": 0.0365, "mean": 0.0, "name": "truncated_normal", "std": 0.01825},
    "layer_norm_epsilon": 1e-5, "loss_scaling": "batch_size", "loss_weight": 0.00048828125,
    "max_position_embeddings": 2048, "mixed_precision": True, "nonlinearity": "swiglu", "num_heads": 32,
    "num_hidden_layers": 32,
    "output_layer_initializer": {
        "a": -0.0045625, "b": 0.0045625, "mean": 0.0, "name": "truncated_normal", "std": 0.00228125,
    },
    "output_logits_scale": 0.13875, "position_embedding_type": "rotary", "rotary_dim": 32,
    "scale_glu_initialization": True, "scale_qk_dot_by_d": True, "share_embedding_weights": True,
    "use_bfloat16": True, "use_bias_in_output": False, "use_ffn_bias": True, "use_ffn_bias_in_attention": True,
    "use_position_embedding": True, "use_projection_bias_in_attention": True, "vocab_size": 32032,
    "weight_initialization_seed": 1,
}  # fmt: skip
OPTIMIZER = {
    "adjust_learning_rate": {"decoder_kernel": 0.0625}, "beta1": 0.9, "beta2": 0.95, "correct_bias": True,
    "eps": 1e-9, "max_gradient_norm": 1.0, "optimizer_type": "AdamW", "weight_decay_rate": 0.1,
}  # fmt: skip
MACHINERY = {"boundary_casting": False, "attention_kernel": "optimized_beta"}
CLUSTER = {
    "checkpoint_path": None, "compile_dir": None, "compile_only": None, "credentials_path": "/path/to/tls.crt",
    "debug_args_path": "debug_args.proto", "disable_version_check": None, "dist_addr": "localhost:8888",
    "dist_backend": "nccl", "enable_distributed": False, "eval_steps": 373, "experimental_api": False,
    "init_method": "env://", "job_labels": ["Mode=Train", "Num_CSX=16"], "job_time_sec": None, "logging": None,
    "mgmt_address": None, "mgmt_namespace": "rel-191", "mode": "train", "model_dir": "model_dir",
    "mount_dirs": ["/path/to/mount"], "num_act_servers": 1, "num_csx": 16, "num_epochs": None, "num_steps": None,
    "num_wgt_servers": None, "num_workers_per_csx": 1, "precision_opt_level": 1, "python_paths": ["/path/to/zoo"],
    "save_losses": True, "service_dir": "model_dir", "target_device": "CSX", "use_appliance_data": False,
    "validate_only": None,
}  # fmt: skip
BY_HAND = {
    "eval_steps": 19375, "enable_distributed": False, "use_appliance_data": True, "precision_opt_level": -1,
    "mgmt_namespace": "rel-191", "wrk_memory_gi": 100,
}  # fmt: skip


def published(phase: str) -> dict:
    """A phase file as it was published, as a mapping."""
    given, by_hand = PHASES[phase], phase == "phase3"
    mixture = [
        {"data_dir": f"/path/to/{entry['source']}", "weight": entry["weight"]}
        | ({"data_subset": entry["subset"]} if "subset" in entry else {})
        for entry in given["mixture"]
    ]
    lr = [{"scheduler": "Linear", **segment} for segment in given["learning_rate"]]
    for segment in () if by_hand else lr:  # what Model Zoo adds to a file that it has read
        segment |= dict.fromkeys(("base_lr", "learning_rate"), segment["initial_learning_rate"])
    loader = {"data_processor": "GptHDF5MapDataProcessor", "vocab_size": 32032, "num_workers": 1, "shuffle": False}
    return {
        "cerebras": {"save_iter_state_path": "/path/to/save/dir"},
        "eval_input": loader | {
            "batch_size": 32, "data_dir": ["/path/to/a", "/path/to/b"] if by_hand else "/path/to/a", "repeat": False,
            "use_worker_cache": False,
        },
        "train_input": loader | {
            "batch_size": given["batch_size"], "mixture": mixture, "persistent_workers": True, "prefetch_factor": 10,
            "repeat": True, "shuffle_seed": 1, "use_worker_cache": False,
        },
        "model": MODEL | MACHINERY | ({} if by_hand else {"attention_softmax_fp32": True}),
        "optimizer": OPTIMIZER | {"learning_rate": lr, "log_summaries": True}
        | ({} if by_hand else {"loss_scaling_factor": 1.0}),
        "runconfig": (BY_HAND if by_hand else CLUSTER) | {
            "max_steps": given["max_steps"], "checkpoint_steps": given["checkpoint_steps"], "seed": 1,
            "is_pretrained_checkpoint": by_hand, "use_cs_grad_accum": True, "log_steps": 1,
            "save_initial_checkpoint": False,
        },
    }  # fmt: skip


def write_tree(directory: Path) -> Path:
    """phase1/params.yaml to phase3/params.yaml under a directory, which it gives back."""
    for phase in PHASES:
        (directory / phase).mkdir(parents=True)
        (directory / phase / "params.yaml").write_text(yaml.safe_dump(published(phase)))
    return directory
