"""Every reason for a stock step, a one-step turn or the length of a window, in one vocabulary.

The worker counts stock steps by them, the scheduler one-step turns and windows; they are the labels
of the metrics and the rows of ``fusedstep explain``.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Words for people; their values are published."""

    # No batch of the engine decodes in a window.
    NOT_SWITCHED_ON = "FUSEDSTEP=on is not set"
    MODEL_RUNNER_V1 = "Model Runner V1"
    POOLING_MODEL = "pooling model"
    ENCODER_DECODER = "encoder-decoder model on a device that is not a CPU"
    REALTIME = "realtime model"
    REPLAY_SSM = "ReplaySSM"
    ROUNDED_STATE = "randomly rounded recurrent state"
    STATE_CACHE = "recurrent state cached as"  # and which mode
    METADATA = "attention metadata of"  # and which builder
    LATENT = "latent attention"  # and with what
    MODEL_STATE = "model state"  # and which
    DIFFUSION = "diffusion model"
    RSWA = "reference sliding-window attention"
    LOGITS_PROCESSORS = "logits processors"  # and which
    SAMPLER = "sampler"  # and which
    SAMPLING_MASK = "sampling masks"
    TRACE_REPLAY = "trace replay"
    FP64_GUMBEL = "float64 Gumbel noise"
    WATERMARK = "watermarking"
    SPECULATION = "speculative decoding"
    KV_CONNECTOR = "KV connector"  # and which
    EC_CONNECTOR = "encoder-cache connector"
    AUX_OUTPUT = "auxiliary outputs"  # and of which part, or with what
    KV_CACHE = "KV cache of"  # and which kind
    FAST_PREFILL = "fast prefill of shared KV caches"
    PIPELINE_PARALLEL = "pipeline parallelism"
    DATA_PARALLEL = "data parallelism"  # and with what
    DECODE_CONTEXT_PARALLEL = "decode context parallelism"
    PREFILL_CONTEXT_PARALLEL = "prefill context parallelism"
    DBO = "dual-batch overlap"
    EPLB = "expert-parallel load balancing"
    OWN_SCHEDULERS = "a scheduler in each worker (external_launcher)"
    NANS = "NaN counting"
    RUST_FRONTEND = "frontend in Rust"
    TOKENS_PER_STEP = "a model of several tokens per step"
    ADAPTIVE_VERIFICATION = "adaptive verification"
    REJECTION_SAMPLER = "rejection sampler"
    HOST_PLAN = "attention planned on the host by"  # and which backends
    NO_OPS = "no step operations"  # and why

    # A batch with such a request takes stock steps.
    POOLING_REQUEST = "pooling request"
    STRUCTURED_OUTPUT = "structured output"  # and which
    OUTSIDE = "structured output beyond its automaton"
    STOP_TOKEN_IDS = "more than 128 stop token ids"
    PARAMETER = "sampling parameter"  # and which
    BATCH_WITH = "a batch with"  # and what
    REMOTE_KV = "KV cache on its way"

    WITH_DRAFTS = "speculative decoding with"  # and what

    # The batch of this turn.
    PREFILL = "prefill"
    FEWER_DRAFTS = "fewer drafts than configured"
    NOTHING_DECODES = "nothing decodes"
    MAY_ADMIT = "a waiting request may be admitted"
    FIXED_AT_1 = "fixed at 1"

    # The limit that bound the length of a window.
    FIXED = "fixed"
    LONGEST = "longest window"
    REMAINING = "longest-remaining request"
    TOKEN_BUDGET = "token budget"
    MAX_MODEL_LEN = "room up to max_model_len"
    HELD_AHEAD = "blocks held ahead are used first"
    LOGPROBS = "room for logprobs"
    STOP_STRINGS = "a request has stop strings"
    BLOCKS = "free KV-cache blocks"
    STATE_BLOCK = "one block of recurrent state per window"
    STREAMS = "a request streams"
    JOINS_ANYTIME = "a waiting request may get ready"
    CANNOT_END = "the window cannot be ended"
    OTHER_RANKS = "another data-parallel rank takes fewer steps"
