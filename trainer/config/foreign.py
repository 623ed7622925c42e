"""Names of other trainers' options, and what they are called here: tried before any name that merely looks alike.

A name stands in the table of the first trainer that has it; the others mean the same by it. Dashes are written as
underscores, and a name that means something else inside a section has the section before it; one that does so anywhere
but at the top level has a dot before it. Imports no torch.
"""

from typing import Final, NamedTuple


class Meant(NamedTuple):
    """Counterpart here of another trainer's option."""

    key: str
    """Dotted, from the root; empty: there is nothing that could be written."""
    note: str = ""
    """Conversion of the value, or the reason why there is no such key and what to do instead."""

    @property
    def said_of_value(self) -> str:
        """The note, as it stands behind a key."""
        return f" ({self.note})" if self.note else ""

    def __str__(self) -> str:
        """Format as the end of a message: what to do."""
        return f"write {self.key}{self.said_of_value}" if self.key else self.note


_ACCUMULATION = "it follows from train.global_batch_size, parallel.micro_batch_size and the ranks; leave it out"
_EPOCHS = "a run is counted in steps of train.global_batch_size rows; data/DOMAIN/epochs in metrics.jsonl counts epochs"
_EXAMPLES = "in steps: examples over train.global_batch_size"
_HF_BALANCE = "with model.moe.balance.convention: hf, under which it means the same"
_MEGATRON_BALANCE = "with model.moe.balance.convention: megatron, under which it means the same"
_WHOLE_LAYERS = "a layer is not cut into pieces (no tensor, sequence or pipeline parallelism); leave it out"
_NO_LORA = "all weights are trained from the start, and nothing is adapted; leave it out"
_NO_RECOMPUTE = "activations are kept, not computed again; lower parallel.micro_batch_size instead, and leave it out"
_NO_DROPOUT = "there is no dropout; leave it out"
_NO_BIAS = "linear layers have no biases; leave it out"
_NO_WINDOW = "attention goes over the whole row (model.document_mask); leave it out"
_NO_SCALING = "rotary positions are as model.rope_theta has them, and not scaled; leave it out"
_NO_MTP = "one token is predicted at each position, the next one; leave it out"
_HEAD_DIM = "a head is model.d_model / model.num_heads wide; leave it out"
_NORMS = "all norms are RMSNorm; leave it out"
_ROUTERS_DTYPE = "routers compute in float32 at least; leave it out"
_PROCESSES = "processes are started by launch --nproc N or torchrun; leave it out"
_VERBS = "train also evaluates, every eval.every steps, and eval does nothing else; leave it out"
_OTHER_UNITS = "in steps"
_NO_HALF = "there is no float16; use train.dtype: bfloat16"
_RESUMES = "a run goes on from its newest checkpoint when its command is given again; leave it out"
_ATTENTION = "torch chooses the attention kernel; leave it out"
_MIN_LR = "as a share of schedule.peak_lr"
_WIDTH_OF_BOTH = "of dense blocks, and model.moe.d_ff, of one expert"
_BETA = "both in one list: [beta1, beta2]"

HUGGING_FACE: Final[dict[str, Meant]] = {
    # models
    "hidden_size": Meant("model.d_model"),
    "num_hidden_layers": Meant("model.num_layers"),
    "num_attention_heads": Meant("model.num_heads"),
    "num_key_value_heads": Meant("model.num_kv_heads"),
    "intermediate_size": Meant("model.d_ff", _WIDTH_OF_BOTH),
    "moe_intermediate_size": Meant("model.moe.d_ff"),
    "max_position_embeddings": Meant("model.seq_len"),
    "num_experts_per_tok": Meant("model.moe.router.top_k"),
    "num_local_experts": Meant("model.moe.num_experts"),
    "n_routed_experts": Meant("model.moe.num_experts"),
    "n_shared_experts": Meant("model.moe.num_shared_experts"),
    "shared_expert_intermediate_size": Meant("model.moe.num_shared_experts", "in experts of model.moe.d_ff each"),
    "first_k_dense_replace": Meant("model.moe.first_dense_layers"),
    "decoder_sparse_step": Meant("model.moe.every"),
    "norm_topk_prob": Meant("model.moe.router.normalize"),
    "routed_scaling_factor": Meant("model.moe.router.scale"),
    "scoring_func": Meant("model.moe.router.score"),
    "n_group": Meant("model.moe.router.groups", "of router.kind: group_limited"),
    "topk_group": Meant("model.moe.router.groups_kept", "of router.kind: group_limited"),
    "router_aux_loss_coef": Meant("model.moe.balance.coef", _HF_BALANCE),
    "router_z_loss_coef": Meant("model.moe.z_loss_coef"),
    "router_jitter_noise": Meant("model.moe.router.jitter"),
    "expert_capacity": Meant("model.moe.capacity.factor", "as a multiple of an even share, not in tokens"),
    "rms_norm_eps": Meant("model.norm_eps"),
    "layer_norm_eps": Meant("model.norm_eps"),
    "layer_norm_epsilon": Meant("model.norm_eps"),
    "tie_word_embeddings": Meant("model.tie_embeddings"),
    "initializer_range": Meant("model.init_std"),
    "hidden_act": Meant("model.activation", "swiglu for silu"),
    "use_qk_norm": Meant("model.qk_norm"),
    "head_dim": Meant("", _HEAD_DIM),
    "sliding_window": Meant("", _NO_WINDOW),
    "rope_scaling": Meant("", _NO_SCALING),
    "aux_loss_alpha": Meant("model.moe.balance.coef", "config coefficient --from deepseek-v3 converts it"),
    "num_nextn_predict_layers": Meant("", _NO_MTP),
    "attention_dropout": Meant("", _NO_DROPOUT),
    "attention_bias": Meant("", _NO_BIAS),
    "output_router_logits": Meant("", "the balance loss is always part of the objective; set model.moe.balance.coef"),
    # TrainingArguments, and trl's
    "do_train": Meant("", _VERBS),
    "do_eval": Meant("", _VERBS),
    "do_predict": Meant("", _VERBS),
    "max_length": Meant("model.seq_len"),
    "max_seq_length": Meant("model.seq_len"),
    "logging_dir": Meant("runs_dir", "the folder of all runs; metrics are in runs_dir/name"),
    "eval_strategy": Meant("eval.every", _OTHER_UNITS),
    "evaluation_strategy": Meant("eval.every", _OTHER_UNITS),
    "save_strategy": Meant("checkpoint.every", _OTHER_UNITS),
    "logging_strategy": Meant("metrics.log_every", _OTHER_UNITS),
    "tf32": Meant("", "float32 is multiplied as float32; for less use train.dtype: bfloat16"),
    "learning_rate": Meant("schedule.peak_lr"),
    "max_steps": Meant("train.steps"),
    "num_train_epochs": Meant("train.steps", _EPOCHS),
    "per_device_train_batch_size": Meant("parallel.micro_batch_size"),
    "train_batch_size": Meant("train.global_batch_size"),
    "per_device_eval_batch_size": Meant("parallel.micro_batch_size", "of which evaluation makes its batches too"),
    "gradient_accumulation_steps": Meant("", _ACCUMULATION),
    "max_grad_norm": Meant("train.grad_clip"),
    "adam_beta1": Meant("optim.betas", _BETA),
    "adam_beta2": Meant("optim.betas", _BETA),
    "adam_epsilon": Meant("optim.eps"),
    "lr_scheduler_type": Meant("schedule.kind"),
    "warmup_ratio": Meant("schedule.warmup_steps"),
    "bf16": Meant("train.dtype", "as bfloat16"),
    "fp16": Meant("", _NO_HALF),
    "torch_dtype": Meant("train.dtype"),
    "save_steps": Meant("checkpoint.every"),
    "save_total_limit": Meant("checkpoint.keep"),
    "eval_steps": Meant("eval.every"),
    "logging_steps": Meant("metrics.log_every"),
    "run_name": Meant("name"),
    "output_dir": Meant("runs_dir", "the folder of all runs; this one's is runs_dir/name"),
    "report_to": Meant("metrics.wandb.mode", "or metrics.tensorboard: true"),
    "torch_compile": Meant("parallel.compile"),
    "gradient_checkpointing": Meant("", _NO_RECOMPUTE),
    "dataloader_num_workers": Meant("data.workers", "which read text once, before training"),
    "data_seed": Meant("seed", "which is of the data, too"),
    "resume_from_checkpoint": Meant("", _RESUMES),
    "ddp_timeout": Meant("parallel.timeout_s"),
    "fsdp": Meant("parallel.data", "as shard"),
    "deepspeed": Meant("engine.deepspeed_config", "with engine.kind: deepspeed"),
    "use_cpu": Meant("parallel.device", "as cpu"),
    "attn_implementation": Meant("", _ATTENTION),
    "load_best_model_at_end": Meant("", "the newest checkpoint is the result; eval --step N looks at another one"),
}

AXOLOTL: Final[dict[str, Meant]] = {
    "base_model": Meant("", "weights start at random; to start from DeepSpeed's, use checkpoint import-deepspeed"),
    "sequence_len": Meant("model.seq_len"),
    "sample_packing": Meant("data.packing", "as bfd"),
    "pad_to_sequence_len": Meant("data.packing", "whose rows always have model.seq_len tokens"),
    "num_epochs": Meant("train.steps", _EPOCHS),
    "val_set_size": Meant("data.split.fraction"),
    "evals_per_epoch": Meant("eval.every", _OTHER_UNITS),
    "saves_per_epoch": Meant("checkpoint.every", _OTHER_UNITS),
    "datasets": Meant("data.sources", "whose entries have a kind: text, jsonl or hf"),
    "streaming": Meant("data.sources.0.kind", "as hf_stream"),
    "dataset_prepared_path": Meant("data.cache_dir"),
    "dataset_processes": Meant("data.workers"),
    "train_on_inputs": Meant("data.sources.0.prompt", "which is read and not learned; what is learned is its text"),
    "flash_attention": Meant("", _ATTENTION),
    "flash_attn": Meant("", _ATTENTION),
    "use_flash_attn": Meant("", _ATTENTION),
    "use_flash_attention": Meant("", _ATTENTION),
    "use_flash_attention_2": Meant("", _ATTENTION),
    "wandb_project": Meant("metrics.wandb.project"),
    "wandb_entity": Meant("metrics.wandb.entity"),
    "wandb_name": Meant("metrics.wandb.name"),
    "wandb_run_name": Meant("metrics.wandb.name"),
    "lora_r": Meant("", _NO_LORA),
    "lora_alpha": Meant("", _NO_LORA),
    "lora_dropout": Meant("", _NO_LORA),
    "lora_target_modules": Meant("", _NO_LORA),
    "adapter": Meant("", _NO_LORA),
    "load_in_8bit": Meant("", _NO_LORA),
    "load_in_4bit": Meant("", _NO_LORA),
    "tokenizer_type": Meant("data.tokenizer.kind", "as file, with the tokenizer.json as data.tokenizer.path"),
    "auto_resume_from_checkpoints": Meant("", _RESUMES),
    "loss_watchdog_threshold": Meant("train.spikes.sigmas", "in standard deviations above the usual loss"),
}

TORCHTITAN: Final[dict[str, Meant]] = {
    "dim": Meant("model.d_model"),
    "n_layers": Meant("model.num_layers"),
    "n_heads": Meant("model.num_heads"),
    "n_kv_heads": Meant("model.num_kv_heads"),
    "inter_dim": Meant("model.d_ff"),
    "moe_inter_dim": Meant("model.moe.d_ff"),
    "max_seq_len": Meant("model.seq_len"),
    "n_expert_groups": Meant("model.moe.router.groups", "of router.kind: group_limited"),
    "n_limited_groups": Meant("model.moe.router.groups_kept", "of router.kind: group_limited"),
    "score_func": Meant("model.moe.router.score"),
    "route_norm": Meant("model.moe.router.normalize"),
    "route_scale": Meant("model.moe.router.scale"),
    "load_balance_coeff": Meant("model.moe.router.bias_update_rate", "of router.kind: bias_balanced"),
    "interleave_moe_layer_step": Meant("model.moe.every"),
    "use_grouped_mm": Meant("parallel.experts_kernel", "as grouped"),
    "local_batch_size": Meant("parallel.micro_batch_size"),
    "max_norm": Meant("train.grad_clip"),
    "mixed_precision_param": Meant("train.dtype"),
    "mixed_precision_reduce": Meant("", "gradients are summed in float32; leave it out"),
    "training.steps": Meant("train.steps"),
    "optimizer.name": Meant("optim.kind"),
    "lr_scheduler.decay_type": Meant("schedule.kind"),
    "decay_ratio": Meant("schedule.decay_fraction", "of schedule.kind: warmup_stable_decay"),
    "min_lr_factor": Meant("schedule.final_fraction"),
    "data_parallel_replicate_degree": Meant("", "ranks that are left over hold copies; start more (launch --nproc)"),
    "data_parallel_shard_degree": Meant("parallel.data", "as shard, over all ranks"),
    "tensor_parallel_degree": Meant("", _WHOLE_LAYERS),
    "pipeline_parallel_degree": Meant("", _WHOLE_LAYERS),
    "context_parallel_degree": Meant("", _WHOLE_LAYERS),
    "expert_parallel_degree": Meant("parallel.ep_size"),
    "expert_tensor_parallel_degree": Meant("", _WHOLE_LAYERS),
    "expert_parallel_comm_backend": Meant("parallel.dispatcher.kind"),
    "checkpoint.interval": Meant("checkpoint.every"),
    "checkpoint.folder": Meant("runs_dir", "the folder of all runs; checkpoints are in runs_dir/name/checkpoints"),
    "keep_latest_k": Meant("checkpoint.keep"),
    "async_mode": Meant("checkpoint.asynchronous", "true or false"),
    "load_step": Meant("", f"{_RESUMES}; eval and generate take --step"),
    "log_freq": Meant("metrics.log_every"),
    "enable_wandb": Meant("metrics.wandb.mode", "as auto"),
    "enable_tensorboard": Meant("metrics.tensorboard"),
    "compile.enable": Meant("parallel.compile"),
    "enable_profiling": Meant("profile.start", "the first step that is looked at"),
    "profile_freq": Meant("profile.start", "one window of profile.steps steps"),
    "activation_checkpoint": Meant("", _NO_RECOMPUTE),
    "dump_folder": Meant("runs_dir", "the folder of all runs; this one's is runs_dir/name"),
    "train_timeout_seconds": Meant("parallel.timeout_s"),
    "dataset_path": Meant("data.sources.0.path"),
    "hf_assets_path": Meant("data.tokenizer.path", "of data.tokenizer.kind: file"),
}

MEGATRON: Final[dict[str, Meant]] = {
    "ffn_hidden_size": Meant("model.d_ff"),
    "moe_ffn_hidden_size": Meant("model.moe.d_ff"),
    "num_query_groups": Meant("model.num_kv_heads"),
    "kv_channels": Meant("", _HEAD_DIM),
    "seq_length": Meant("model.seq_len"),
    "rotary_base": Meant("model.rope_theta"),
    "norm_epsilon": Meant("model.norm_eps"),
    "init_method_std": Meant("model.init_std"),
    "untie_embeddings_and_output_weights": Meant("model.tie_embeddings", "as its opposite"),
    "qk_layernorm": Meant("model.qk_norm"),
    "normalization": Meant("", _NORMS),
    "mtp_num_layers": Meant("", _NO_MTP),
    "num_moe_experts": Meant("model.moe.num_experts"),
    "moe_router_dtype": Meant("", _ROUTERS_DTYPE),
    "recompute_activations": Meant("", _NO_RECOMPUTE),
    "hidden_dropout": Meant("", _NO_DROPOUT),
    "moe_router_topk": Meant("model.moe.router.top_k"),
    "moe_router_score_function": Meant("model.moe.router.score"),
    "moe_router_topk_scaling_factor": Meant("model.moe.router.scale"),
    "moe_router_num_groups": Meant("model.moe.router.groups", "of router.kind: group_limited"),
    "moe_router_group_topk": Meant("model.moe.router.groups_kept", "of router.kind: group_limited"),
    "moe_router_load_balancing_type": Meant("model.moe.router.kind", "or model.moe.balance.scope"),
    "moe_router_enable_expert_bias": Meant("model.moe.router.kind", "as bias_balanced"),
    "moe_router_bias_update_rate": Meant("model.moe.router.bias_update_rate", "of router.kind: bias_balanced"),
    "moe_input_jitter_eps": Meant("model.moe.router.jitter"),
    "moe_aux_loss_coeff": Meant("model.moe.balance.coef", _MEGATRON_BALANCE),
    "moe_z_loss_coeff": Meant("model.moe.z_loss_coef", "times the number of MoE layers: theirs is summed, ours a mean"),
    "moe_expert_capacity_factor": Meant("model.moe.capacity.factor"),
    "moe_token_drop_policy": Meant("model.moe.capacity.policy", "probability for probs"),
    "moe_pad_expert_input_to_capacity": Meant("parallel.dispatcher.kind", "as padded_all_to_all"),
    "moe_token_dispatcher_type": Meant("parallel.dispatcher.kind"),
    "moe_grouped_gemm": Meant("parallel.experts_kernel", "as grouped"),
    "moe_layer_freq": Meant("model.moe.every", "and model.moe.first_dense_layers"),
    "moe_shared_expert_intermediate_size": Meant("model.moe.num_shared_experts", "in experts of model.moe.d_ff each"),
    "train_iters": Meant("train.steps"),
    "train_samples": Meant("train.steps", _EXAMPLES),
    "lr": Meant("schedule.peak_lr"),
    "min_lr": Meant("schedule.final_fraction", _MIN_LR),
    "lr_warmup_iters": Meant("schedule.warmup_steps"),
    "lr_warmup_samples": Meant("schedule.warmup_steps", _EXAMPLES),
    "lr_warmup_fraction": Meant("schedule.warmup_steps"),
    "lr_decay_style": Meant("schedule.kind"),
    "lr_decay_iters": Meant("train.steps", "at whose end the learning rate is schedule.final_fraction of its peak"),
    "clip_grad": Meant("train.grad_clip"),
    "adam_eps": Meant("optim.eps"),
    "save_interval": Meant("checkpoint.every"),
    "eval_interval": Meant("eval.every"),
    "eval_iters": Meant("eval.max_tokens_per_domain", "in tokens of each domain"),
    "log_interval": Meant("metrics.log_every"),
    "save": Meant("runs_dir", "the folder of all runs; checkpoints are in runs_dir/name/checkpoints"),
    "load": Meant("", _RESUMES),
    "data_path": Meant("data.sources.0.path"),
    "tokenizer_model": Meant("data.tokenizer.path", "of data.tokenizer.kind: file"),
    "expert_model_parallel_size": Meant("parallel.ep_size"),
    "tensor_model_parallel_size": Meant("", _WHOLE_LAYERS),
    "pipeline_model_parallel_size": Meant("", _WHOLE_LAYERS),
    "context_parallel_size": Meant("", _WHOLE_LAYERS),
    "sequence_parallel": Meant("", _WHOLE_LAYERS),
    "use_distributed_optimizer": Meant("parallel.data", "as shard; or engine.kind: deepspeed"),
    "use_torch_fsdp2": Meant("parallel.data", "as shard"),
    "recompute_granularity": Meant("", _NO_RECOMPUTE),
    "distributed_timeout_minutes": Meant("parallel.timeout_s", "in seconds"),
    "num_workers": Meant("data.workers", "which read text once, before training"),
    "tensorboard_dir": Meant("metrics.tensorboard", "true or false: the folder is runs_dir/name/tensorboard"),
}

NANOGPT: Final[dict[str, Meant]] = {
    "n_layer": Meant("model.num_layers"),
    "n_head": Meant("model.num_heads"),
    "n_embd": Meant("model.d_model"),
    "block_size": Meant("model.seq_len"),
    "batch_size": Meant("parallel.micro_batch_size", "or train.global_batch_size, of all ranks and micro-batches"),
    "max_iters": Meant("train.steps"),
    "warmup_iters": Meant("schedule.warmup_steps"),
    "decay_lr": Meant("schedule.final_fraction", "1 for a constant learning rate"),
    "beta1": Meant("optim.betas", _BETA),
    "beta2": Meant("optim.betas", _BETA),
    "dropout": Meant("", _NO_DROPOUT),
    "bias": Meant("", _NO_BIAS),
    "out_dir": Meant("runs_dir", "the folder of all runs; this one's is runs_dir/name"),
    "init_from": Meant("", _RESUMES),
    "always_save_checkpoint": Meant("checkpoint.every", "in steps, whether or not the loss has fallen"),
    "wandb_log": Meant("metrics.wandb.mode", "as auto"),
    "dataset": Meant("data.sources.0.path"),
}

OTHERS: Final[dict[str, Meant]] = {
    "epochs": Meant("train.steps", _EPOCHS),
    "max_epochs": Meant("train.steps", _EPOCHS),
    "num_steps": Meant("train.steps"),
    "total_steps": Meant("train.steps"),
    "accumulate_grad_batches": Meant("", _ACCUMULATION),
    "accumulation_steps": Meant("", _ACCUMULATION),
    "gradient_clip_val": Meant("train.grad_clip"),
    "precision": Meant("train.dtype", "float32, bfloat16 or float64"),
    "bfloat16": Meant("train.dtype", "as bfloat16"),
    "context_length": Meant("model.seq_len"),
    "capacity_factor": Meant("model.moe.capacity.factor"),
    "aux_loss_coef": Meant("model.moe.balance.coef", "with model.moe.balance.convention for whose definition it is"),
    "top_k_experts": Meant("model.moe.router.top_k"),
    "num_gpus": Meant("", _PROCESSES),
    "world_size": Meant("", _PROCESSES),
    "devices": Meant("", _PROCESSES),
    "num_nodes": Meant("", _PROCESSES),
    "nproc_per_node": Meant("", _PROCESSES),
    "accelerator": Meant("parallel.device", "cpu or cuda"),
    "strategy": Meant("parallel.data", "shard for fsdp, replicate for ddp"),
    "log_every_n_steps": Meant("metrics.log_every"),
    "val_check_interval": Meant("eval.every", _OTHER_UNITS),
    ".iterations": Meant("train.steps"),
    "train.iterations": Meant("train.steps"),
    "training.iterations": Meant("train.steps"),
    "num_iterations": Meant("train.steps"),
    "n_experts": Meant("model.moe.num_experts"),
    "moe_num_experts": Meant("model.moe.num_experts"),
    "experts_per_token": Meant("model.moe.router.top_k"),
    "min_capacity": Meant("model.moe.capacity.min"),
    "gradient_clipping": Meant("train.grad_clip"),
    "mixed_precision": Meant("train.dtype", "float32, bfloat16 or float64"),
    "activation_checkpointing": Meant("", _NO_RECOMPUTE),
    "optimizer": Meant("optim.kind"),
    "lr_scheduler": Meant("schedule.kind"),
    "resume": Meant("", _RESUMES),
    "checkpoint_dir": Meant("runs_dir", "the folder of all runs; checkpoints are in runs_dir/name/checkpoints"),
    "log_dir": Meant("runs_dir", "the folder of all runs; metrics are in runs_dir/name"),
    "random_seed": Meant("seed"),
}
"""Names of Lightning, DeepSpeed and hand-written scripts."""

VALUES: Final[dict[str, str]] = {
    **dict.fromkeys(("off", "no", "false", "none", "null", "disable", "never"), "disabled"),
    **dict.fromkeys(("on", "yes", "true", "enabled", "enable"), "online"),
    "dryrun": "offline",
    "live": "online",
    **dict.fromkeys(("fp32", "float", "single", "f32"), "float32"),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bfloat16"),
    **dict.fromkeys(("fp64", "double", "f64"), "float64"),
    **dict.fromkeys(("gpu", "cuda:0", "nvidia"), "cuda"),
    **dict.fromkeys(("silu", "swish", "swigelu"), "swiglu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu"),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "fusedadam"), "adamw"),
    **dict.fromkeys(("cosine", "cosine_with_warmup", "constant", "constant_with_warmup"), "warmup_cosine"),
    **dict.fromkeys(("wsd", "trapezoidal", "linear", "linear_with_warmup"), "warmup_stable_decay"),
    **dict.fromkeys(("fsdp", "fsdp2", "full_shard", "zero3"), "shard"),
    **dict.fromkeys(("ddp", "no_shard"), "replicate"),
    **dict.fromkeys(("torch", "pytorch"), "native"),
    **dict.fromkeys(("alltoall", "a2a", "standard"), "all_to_all"),
    **dict.fromkeys(("allgather", "ag"), "all_gather"),
    **dict.fromkeys(("aux_loss_free", "noaux_tc", "loss_free"), "bias_balanced"),
    **dict.fromkeys(("topk", "topk_softmax", "mixtral"), "top_k"),
    **dict.fromkeys(("huggingface", "hf_dataset", "parquet", "csv", "arrow", "datasets"), "hf"),
    **dict.fromkeys(("streaming", "stream"), "hf_stream"),
    **dict.fromkeys(("json", "ndjson"), "jsonl"),
    **dict.fromkeys(("txt", "plain", "files"), "text"),
    **dict.fromkeys(("hf_tokenizer", "pretrained", "gpt2", "llama"), "file"),
    "bytes": "byte",
    "global": "global_batch",
    **dict.fromkeys(("probs", "prob"), "probability"),
    **dict.fromkeys(("packed", "documents", "best_fit"), "bfd"),
    **dict.fromkeys(("transformers", "huggingface_hub"), "hf"),
    **dict.fromkeys(("grouped_gemm", "grouped_mm"), "grouped"),
}
"""Values of other trainers, in lower case, and the value of ours with the same meaning, where it is allowed."""
BESIDES: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(("constant", "constant_with_warmup"), ("final_fraction", "1")),
    **dict.fromkeys(("linear", "linear_with_warmup"), ("decay_fraction", "1")),
}
"""Keys, with their values, that some values of ours need beside them."""
OF_SUFFIX: Final[dict[str, str]] = {
    **dict.fromkeys(("txt", "text", "md", "rst"), "kind: text, path: "),
    **dict.fromkeys(("jsonl", "ndjson"), "kind: jsonl, path: "),
    **{name: f"kind: hf, path: {name}, data_files: " for name in ("parquet", "arrow", "csv", "json")},
}
"""Options of a section that reads a file, by the suffix of the file's name."""
NO_HALF: Final = frozenset({"fp16", "float16", "half", "16-mixed", "f16"})
"""Names of half precision, which does not exist here and must not be taken for bfloat16."""
SECTIONS: Final = frozenset(
    {"training", "optimizer", "lr_scheduler", "parallelism", "model_args", "training_args", "job", "comm", "validation"}
)
"""Sections of theirs whose keys are spread over ours."""
TABLES: Final = (HUGGING_FACE, AXOLOTL, TORCHTITAN, MEGATRON, NANOGPT, OTHERS)


def meant_by(name: str, section: str = "") -> Meant | None:
    """Return what an option of another trainer is here; None if none of them has it.

    Args:
        name: of the option, with dashes or underscores.
        section: that it was found in, as far as the last dot.
    """
    bare = name.replace("-", "_").lower()
    for one in (f"{section.rpartition('.')[2]}.{bare}", bare):
        for table in TABLES:
            if one in table:
                return table[one]
    return None
