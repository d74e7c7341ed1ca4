"""Every key of Model Zoo's parameter files that crystal knows, section by section, of both forms.

From the published phase files of CrystalCoder (release 1.9.1) and the classes of release 2.10 that read a trainer's
file. What is read is read in `cerebras_params_read` and `cerebras_params_model`. The value that stands first under
`only` is what crystal does; where that is Model Zoo's "off", the key may be there to say so.
"""

from __future__ import annotations

from crystal.interop.cerebras_params_node import Keys

_OFF = (False,)
_NONE: tuple = (None,)
_LOSS_SCALE = "loss_scaling_factor initial_loss_scale steps_per_increase min_loss_scale max_loss_scale"
_SCALED_BACK = "gradients are scaled for the sake of half precision, and scaled back"

_DECODER = {
    "nonlinearity": ("swiglu",),
    "position_embedding_type": ("rotary",),
    "attention_type": ("scaled_dot_product",),
    "dropout_rate": (0.0,),
    "attention_dropout_rate": (0.0, None),
    "embedding_dropout_rate": (0.0,),
    "use_bias_in_output": _OFF,
    "use_position_embedding": (True,),
    "scale_glu_initialization": (True,),
    "loss_scaling": ("batch_size",),
    "scale_output_logits_by_d": (True,),
    "attention_logits_alpha": (1.0,),
    "attention_module": ("aiayn_attention", "multiquery_attention"),
    "attention_qk_norm_layer": _NONE,
    "attention_logit_softcapping": _NONE,
    "final_logit_softcapping": _NONE,
    "attention_sliding_window_length": _NONE,
    "attention_sink_tokens": _NONE,
    "attention_chunk_size": _NONE,
    "attention_inner_dim": _NONE,
    "sliding_window_every_other_decoder_layer": _OFF,
    "fixed_sparse_attention": _NONE,
    "scale_qk_dot_by_layer_idx": _OFF,
    "embedding_layer_norm": _OFF,
    "norm_first_sandwich": _OFF,
    "pos_scaling_factor": (1.0,),
    "pos_scaling_type": ("linear",),
    "pos_scaling_extra_args": _NONE,
    "rel_distance_mode": ("default",),
    "cross_attention_layers": ([],),
    "extra_ffn_params": ({},),
    "memory_tokens": _NONE,
    "moe": ({},),
    "lr_adjustment_groups": _NONE,
}
_SHAPE = """name vocab_size hidden_size num_hidden_layers num_heads filter_size max_position_embeddings rotary_dim
    share_embedding_weights layer_norm_epsilon use_projection_bias_in_attention use_ffn_bias_in_attention use_ffn_bias
    embeddings_scale scale_qk_dot_by_d embedding_initializer initializer output_layer_initializer ffn_initializer
    ffn_output_layer_initializer initializer_range output_logits_scale output_logits_alpha loss_weight norm_type
    rope_theta mup_base_hidden_size mup_base_filter_size extra_attention_params"""
_COMPUTED = {
    "how it is computed, not what": """attention_kernel attention_softmax_fp32 boundary_casting mixed_precision
        use_bfloat16 fp16_type fold_rope_consts use_experimental_flex_api""",
    "draws are others here in any case": "weight_initialization_seed",
    "validation and generation": """compute_eval_metrics start_token loop_dim stop_sequences max_tokens temperature
        top_k top_p""",
    "of what is off": "num_relative_attention_buckets position_embedding_offset attention_qk_norm_eps",
}
_LOUD = "nonlinearity position_embedding_type dropout_rate loss_scaling"
_DOES = "which is what this decoder does"
MODEL = Keys(_SHAPE, _DECODER, _COMPUTED, f"{_LOUD} scale_glu_initialization", _DOES)  # of 1.9.1
TRAINER_MODEL = Keys(_SHAPE, _DECODER, _COMPUTED, f"{_LOUD} attention_dropout_rate", _DOES)

NORMAL = Keys("name mean std")
TRUNCATED_NORMAL = Keys("name mean std a b")

# --- release 1.9.1: four sections

PUBLISHED = Keys(
    "train_input model optimizer runconfig",
    {"sparsity": ({},)},
    {"validation": "eval_input", "the machine's": "cerebras"},
)
_ADAMW = {
    "correct_bias": (True,),
    "amsgrad": _OFF,
    "l2_regularization_rate": (0.0,),
    "momentum": (0.0,),
    "max_gradient_value": _NONE,
}
OPTIMIZER = Keys(
    "optimizer_type beta1 beta2 eps weight_decay_rate max_gradient_norm learning_rate adjust_learning_rate",
    _ADAMW | {"grad_accum_steps": (1,)},
    {
        _SCALED_BACK: _LOSS_SCALE,
        "logging": "log_summaries log_grads log_hists",
        "starting again": "disable_lr_steps_reset",
    },
)
LEARNING_RATE = Keys(
    "scheduler initial_learning_rate end_learning_rate decay_steps steps base_lr learning_rate",
    {"cycle": _OFF},
    {"starting again": "disable_lr_steps_reset"},
)
RUNCONFIG = Keys(
    "max_steps checkpoint_steps seed is_pretrained_checkpoint checkpoint_path",
    {
        "mode": ("train", "train_and_eval"),
        "num_steps": _NONE,
        "num_epochs": _NONE,
        "steps_per_epoch": _NONE,
        "grad_accum_steps": (1,),
    },
    {
        "the machine": """target_device num_csx num_act_servers num_wgt_servers num_workers_per_csx num_replicas
            multireplica mgmt_address mgmt_namespace credentials_path job_labels job_time_sec job_priority mount_dirs
            python_paths wrk_memory_gi act_memory_gi cmd_memory_gi wgt_memory_gi compile_crd_memory_gi
            execute_crd_memory_gi transfer_processes execution_strategy experimental_api enable_distributed dist_addr
            dist_backend init_method main_process_id sync_batchnorm use_appliance_data use_cs_grad_accum
            use_cstorch_optimizer_step compile_dir compile_only validate_only autogen_policy variant debug_args_path
            disable_version_check service_dir precision_opt_level""",
        "logging": """log_steps logging enable_summaries show_debug_metrics save_losses save_summary_steps
            save_stream_size check_loss_values skip_train_recv_activations""",
        "files of checkpoints": """model_dir save_initial_checkpoint keep_checkpoint_max autoload_last_checkpoint
            disable_strict_checkpoint_loading""",
        "validation": "eval_steps eval_frequency",
    },
)

# --- release 2.10: a trainer

TRAINER_FILE = Keys("trainer")
TRAINER = Keys("init fit", {}, {"validation": "validate validate_all"})
INIT = Keys(
    "model optimizer schedulers precision loop checkpoint callbacks seed",
    {"sparsity": ({}, [])},
    {"the machine": "backend device", "files and logging": "model_dir logging loggers autorestart"},
)
ADAMW = Keys("betas eps weight_decay", _ADAMW, {"the schedule says it": "lr"})
PRECISION = Keys(
    "max_gradient_norm",
    {"max_gradient_value": _NONE},
    {_SCALED_BACK: _LOSS_SCALE, "how it is computed": "enabled fp16_type precision_opt_level log_loss_scale"},
)
SEQUENCE = Keys("schedulers milestones", {"last_epoch": (-1,), "param_group_tags": _NONE})
SCHEDULER = Keys(
    "initial_learning_rate end_learning_rate total_iters", {"cycle": _OFF, "param_group_tags": _NONE}
)
LOOP = Keys(
    "max_steps",
    {"num_steps": _NONE, "num_epochs": _NONE, "steps_per_epoch": _NONE, "grad_accum_steps": (1,)},
    {"validation": "eval_frequency eval_steps"},
)
CHECKPOINT = Keys(
    "steps",
    {},
    {
        "files of checkpoints": """autoload_last_checkpoint disable_strict_checkpoint_loading save_initial_checkpoint
            checkpoint_name"""
    },
)
CALLBACKS = Keys(
    "LoadCheckpointStates",
    {},
    {
        "logging": """LogInputSummaries LogOptimizerParamGroup LogSparsity CheckLoss ModelZooParamsMetadata
            DumpAvailableTensorNames SummaryTensorListener NormTensorListener ComputeNorm ComputeNormGNS
            DumpActivations NaNChecker Profiler RateProfiler OpProfiler SavePerformanceData FlopUtilization
            DurationProfiler CountParams EmailNotification SlackNotification""",
        "files of checkpoints": "KeepNCheckpoints SaveCheckpointState",
        "the machine": "GlobalFlags ScopedTrainFlags ScopedValidateFlags DebugArgsPath",
        "validation": "ModelEvalMetrics EleutherEvalHarness BigCodeEvalHarness",
    },
)
FIT = Keys("train_dataloader ckpt_path", {}, {"validation": "val_dataloader"})

# --- data, in both

DATA = Keys(
    "batch_size vocab_size max_sequence_length mixture data_dir data_subset",
    {
        "data_processor": ("GptHDF5MapDataProcessor", "GptHDF5DataProcessor"),
        "use_vsl": _OFF,
        "num_samples": _NONE,
        "dataset_map_fn": _NONE,
    },
    {
        "the machine": """num_workers prefetch_factor persistent_workers use_worker_cache micro_batch_size
            use_multiple_workers""",
        "order inside a source, and its ends, which are crystal's own": """shuffle shuffle_seed shuffle_buffer repeat
            sort_files drop_last pad_last""",
    },
)
MIXED = Keys("data_dir weight data_subset")
