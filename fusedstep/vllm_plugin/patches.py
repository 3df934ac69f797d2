"""All that fusedstep patches in vLLM or hangs on its objects, with the reason.

tests/test_patches.py finds what is not listed. Subclasses that vLLM is given by its own options
(worker, scheduler, attention backend, platform) are not patches.
"""

from __future__ import annotations

from fusedstep.vllm_plugin.frontend.patches import FRONTEND
from fusedstep.vllm_plugin.patch import Kind, Patch

PATCHES = (
    # Engine core.
    Patch(
        "scheduler/door.py",
        "EngineCore.__init__",
        Kind.REPLACED,
        "EngineCore.__init__",
        "the scheduler's door must hear of aborts as they come",
    ),
    Patch(
        "scheduler/door.py",
        "*EngineCoreProc.run_busy_loop",
        Kind.REPLACED,
        "EngineCoreProc.run_busy_loop, DPEngineCoreProc.run_busy_loop",
        "the same in a process of its own, which loads plug-ins within EngineCore.__init__",
    ),
    Patch(
        "scheduler/door.py",
        "EngineCoreProc._reject_add_while_paused",
        Kind.REPLACED,
        "EngineCoreProc._reject_add_while_paused, since vLLM 0.33",
        "a request that was announced and is rejected is on its way no more: windows go on",
    ),
    Patch(
        "scheduler/door.py",
        "EngineCore.preprocess_add_request",
        Kind.REPLACED,
        "EngineCore.preprocess_add_request",
        "runs on the input thread while the main thread waits for a window: an arrival ends it",
    ),
    Patch(
        "scheduler/door.py",
        "preprocess_add_request.announces",
        Kind.HUNG,
        "EngineCore.preprocess_add_request",
        "plug-ins are loaded more than once in a process; the patch is made once",
    ),
    Patch(
        "scheduler/door.py",
        "core.aborts_queue.put_nowait",
        Kind.REPLACED,
        "EngineCore.aborts_queue",
        "aborts pass the input thread through this queue only",
    ),
    Patch(
        "scheduler/scheduler.py",
        "manager.watermark_blocks",
        Kind.LENT,
        "KVCacheManager.watermark_blocks",
        "a newcomer must not take the blocks that running requests will need",
    ),
    Patch(
        "scheduler/admission.py",
        "scheduler.lora_config*",
        Kind.LENT,
        "AsyncScheduler.lora_config, and max_loras of a copy",
        "a newcomer must not take the place of an adapter whose requests sit a turn out",
    ),
    Patch(
        "scheduler/scheduler.py",
        "request.next_decode_eligible_step",
        Kind.SET,
        "Request.next_decode_eligible_step",
        "a request that ends with the window in flight is left out of one turn",
    ),
    Patch(
        "scheduler/scheduler.py",
        "request.spec_token_ids",
        Kind.SET,
        "Request.spec_token_ids",
        "K-1 placeholders reserve the blocks of a window",
    ),
    Patch(
        "scheduler/scheduler.py",
        "request.num_*",
        Kind.SET,
        "Request.num_computed_tokens, num_output_placeholders",
        "a window that gave way before its first step: vLLM takes drafts back only beside a token",
    ),
    Patch(
        "stamps.py",
        "output.*",
        Kind.HUNG,
        "SchedulerOutput.arrivals_seen, num_stops, trace; ModelRunnerOutput.rounds",
        "a window ends when more requests have arrived than its scheduler had seen, or after so "
        "many stops: requests wait for a row, or a smaller batch is faster; turns that are traced "
        "have numbers; vLLM counts drafts by round, of which a window has several",
    ),
    Patch(
        "scheduler/rounds.py",
        "request.spec_decode_metrics",
        Kind.SET,
        "Request.spec_decode_metrics",
        "a window comes back as one batch: ours takes it for as many as it had rounds",
    ),
    Patch(
        "grammar_tables.py",
        "output.grammars",
        Kind.HUNG,
        "SchedulerOutput",
        "automata of structured output, for the device",
    ),
    Patch(
        "scheduler/grammars.py",
        "manager._create_grammar",
        Kind.REPLACED,
        "StructuredOutputManager._create_grammar",
        "a grammar's automaton is made where vLLM compiles the grammar, in its threads",
    ),
    Patch(
        "scheduler/scheduler.py",
        "output.*_structured_output_*",
        Kind.SET,
        "SchedulerOutput.has_structured_output_requests, pending_structured_output_tokens",
        "the device masks: the engine core need not wait for the tokens in flight",
    ),
    # Worker.
    Patch(
        "worker.py",
        "cpu_module.CPUModelRunner",
        Kind.LENT,
        "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
        "vLLM 0.32's CPU worker names its runner class inside init_device",
    ),
    Patch(
        "runner/ranks.py",
        "model_runner.dispatch_cg_and_sync_dp",
        Kind.LENT,
        "dispatch_cg_and_sync_dp, as Model Runner V2 knows it",
        "dummy batches of one agreement make none of their own",
    ),
    Patch(
        "runner/tables.py",
        "penalties.output_bin_counts",
        Kind.SET,
        "PenaltiesState.output_bin_counts",
        "on a CPU: zeros that take memory only where they are written",
    ),
    Patch(
        "runner/recurrent.py",
        "layers.builder.mamba_aligned_state_indices",
        Kind.SET,
        "GDNAttentionMetadataBuilder.mamba_aligned_state_indices",
        "indices of the last stock step's batch: the builder takes those of ours from their tables",
    ),
    Patch(
        "runner/recurrent.py",
        "state._mamba_state_idx_gpu",
        Kind.SET,
        "MambaHybridModelState._mamba_state_idx_gpu",
        "the same values, with room behind them for rows that stand still",
    ),
    Patch(
        "runner/output.py",
        "output.aux_output_connector_output",
        Kind.SET,
        "ModelRunnerOutput.aux_output_connector_output",
        "the experts of a window's tokens",
    ),
    Patch(
        "runner/experts.py",
        "pending.*",
        Kind.SET,
        "PendingAuxOutput: its connector, and the copies of a step",
        "a window hands over several steps; what a request has computed is known, not only bounded",
    ),
    Patch(
        "runner/drafter.py",
        "common.*",
        Kind.SET,
        "CommonAttentionMetadata (our own instance)",
        "the lengths have moved before a backend plans the next draft",
    ),
    Patch(
        "runner/decode_model.py",
        "common.*",
        Kind.SET,
        "CommonAttentionMetadata (our own instance)",
        "one more token per row before a backend plans the next step",
    ),
    Patch(
        "runner/cross_attention.py",
        "common.*",
        Kind.SET,
        "CommonAttentionMetadata (our own instance)",
        "the encoder's lengths, for the groups that attend to it",
    ),
    Patch(
        "rotation.py",
        "module.*",
        Kind.SET,
        "LlamaAttention.rotary_emb, RMSNorm._forward_method; handed_over of our attention",
        "--rope fused: our attention norms and rotates, the model hands on",
    ),
    # vLLM on a CPU.
    Patch(
        "cpu/platform.py",
        "dispatcher.sys",
        Kind.REPLACED,
        "triton_utils.dispatcher.sys",
        "it looks into every object of every module; one of llvmlite's ends it",
    ),
    Patch(
        "cpu/platform.py",
        "vllm.triton_utils.HAS_TRITON",
        Kind.LENT,
        "vllm.triton_utils.HAS_TRITON",
        "vLLM registers its CPU kernels only where there is no Triton",
    ),
    Patch(
        "cpu/platform.py",
        "topk_topp_sampler.HAS_TRITON",
        Kind.SET,
        "vllm.v1.sample.ops.topk_topp_sampler.HAS_TRITON",
        "torch sorts faster than an interpreted kernel",
    ),
    Patch(
        "cpu/platform.py",
        "tower.HAS_TRITON",
        Kind.SET,
        "vllm.model_executor.models.qwen3_vl.HAS_TRITON",
        "an interpreted kernel gives NaN in bfloat16; and of two more vision towers",
    ),
    Patch(
        "cpu/platform.py",
        "scheduler_config.async_scheduling",
        Kind.SET,
        "SchedulerConfig.async_scheduling",
        "vLLM switches it off on a CPU; windows are scheduled ahead there, too",
    ),
    Patch(
        "cpu/stock_kernels.py",
        "register_kernels",
        Kind.ADDED,
        "vllm.triton_utils.dispatcher",
        "native code for Model Runner V2's kernels on a CPU",
    ),
    Patch(
        "cpu/triton_stand_in.py",
        "backends[*]",
        Kind.ADDED,
        "triton.backends.backends",
        "vLLM asks for a Triton backend named cpu; rare kernels run interpreted",
    ),
    # Every process.
    Patch(
        "register.py",
        "register_backend",
        Kind.ADDED,
        "vllm.v1.attention.backends.registry",
        "--attention-backend FUSEDSTEP, also of plain vLLM",
    ),
    Patch(
        "register.py",
        "copyreg.pickle",
        Kind.ADDED,
        "AttentionBackendEnum",
        "a new process unpickles options before it loads plug-ins",
    ),
    Patch(
        "startup.py",
        "*.addFilter",
        Kind.ADDED,
        "loggers of vLLM's engine core and workers, and of uvicorn",
        "a failed start is one line, and the end of a server is not reported as an error",
    ),
    Patch(
        "startup.py",
        "sys.stderr",
        Kind.REPLACED,
        "a process of vLLM's that fails to start",
        "multiprocessing prints the traceback once more",
    ),
    *FRONTEND,
)
