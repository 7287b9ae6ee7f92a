"""Loads a model: reads its header, fits it to the machine, and creates the parts of an engine."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b

from dsmoe_local.base import progress
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.load.fit import Fit, fit_model
from dsmoe_local.engine.load.kernel_speeds import read_speeds
from dsmoe_local.engine.load.kernels import (
    KernelChoice,
    Kernels,
    check_deterministic,
    choose_kernels,
    plain,
)
from dsmoe_local.engine.load.machine import available_memory, physical_cores
from dsmoe_local.engine.load.memory import ContextRequest
from dsmoe_local.engine.load.prefetch import page_experts
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.observe.registry import check_observers, check_supported, n_outputs
from dsmoe_local.engine.prompts.choice import template_of
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.schedule.plan import Limits
from dsmoe_local.engine.types import ALL_LAYERS, MIN_CONTEXT, ModelInfo, ModelOptions
from dsmoe_local.model.architectures import no_table
from dsmoe_local.model.file_type import file_type_name
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import read_any_model
from dsmoe_local.model.hyperparameters import Hyperparameters, ModelOutline
from dsmoe_local.model.identity import exact_identity
from dsmoe_local.model.split_name import model_stem

_MAX_TOKENS = (1 << 24) - 1
_MAX_PARALLEL = native.MAX_SEQUENCES // 2  # the other sequence ids are for parked prefixes
_MAX_THREADS = 512  # ggml's own limit; OpenMP ends the process if the system has no more threads
_TOKENIZER = "tokenizer."
_TEMPLATES = "tokenizer.chat_template"


@dataclass(slots=True)
class LoadedModel:
    """A model in memory with its context, encoder and observers.

    Only the engine's thread may use it, except for `info`, `encoder`, `log` and the model's vocabulary, which
    are thread-safe. `context` and `observers` may be replaced. `scores_prompts` is that of ModelOptions.
    """

    info: ModelInfo
    model: native.Model
    context: native.Context
    encoder: PromptEncoder
    observers: Dispatcher
    limits: Limits
    scores_prompts: bool

    def log(self) -> tuple[str, ...]:
        """Return llama.cpp's latest log lines."""
        return native.log_lines()

    def close(self) -> None:
        """Free all native memory and let observers finish their files, even if one of them raises."""
        with ExitStack() as last_to_first:
            for part in (self.model, self.observers, self.context, self.encoder):
                last_to_first.callback(part.close)


def load_model(options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> LoadedModel:
    """Load a model (see `Engine.load`)."""
    _check(options)
    file, outline = read_any_model(options.path)
    check_supported(options.observers, outline, options.path)
    outline = replace(outline, n_experts_per_token=_n_experts(options, outline))
    _check_cache_types(options, outline)
    with ExitStack() as made:
        template = _template(options, file, outline)
        if template is not None:
            made.callback(template.close)
        unified = _unified(options)
        context_of = partial(context_options, options, unified=unified)
        request = ContextRequest(options.n_context, outline.n_context, options.n_parallel, unified)
        fit = fit_model(options, file, outline, request, context_of)
        for note in fit.notes:
            listen(progress.Note(note))
        n_context = _context_per_request(options.n_parallel, unified, fit.n_context, outline.n_context)
        _note_long_context(n_context, outline.n_context, listen)
        kernels = _kernel_choice(options, file, fit, listen)
        model = _load_weights(options, file, outline, fit, kernels, listen, stop)
        made.callback(model.close)
        _check_rewindable(options, outline, model)
        # This compares the file with the header that was checked. It may have been replaced since then.
        identity = exact_identity(file)
        if template is not None:
            template.bind(bos=model.text_of(model.bos), eos=model.text_of(model.eos))
        own = []
        if fit.paged:
            budget = available_memory() - fit.n_buffer_bytes
            own = [page_experts(file, outline, fit.placement, budget, listen, stop)]
        observers = Dispatcher(options.observers, model, outline, own=own)
        made.callback(observers.close)
        context = native.Context(
            model, context_of(fit.flash_attention, fit.n_context, eval_callback=observers.eval_callback)
        )
        made.callback(context.close)
        native.add_log(f"kernels: {kernels.about} ({kernels.reason})")
        encoder = PromptEncoder(model, template, n_context, outline.n_context)
        made.callback(encoder.close)
        info = _info(options, file, outline, model, fit, n_context, unified, template)
        arithmetic = _arithmetic(options, fit, kernels)
        loaded = LoadedModel(
            replace(
                info,
                kernels=f"{arithmetic}, steps of {context.n_ubatch} tokens",
                kernels_reason=kernels.reason,
                cache_identity=_cache_identity(options, outline, arithmetic, identity),
            ),
            model,
            context,
            encoder,
            observers,
            _limits(options, fit, n_context, unified, context),
            options.scores_prompts,
        )
        made.pop_all()  # closed by LoadedModel.close from here on
    return loaded


def _limits(
    options: ModelOptions, fit: Fit, n_context: int, unified: bool, context: native.Context
) -> Limits:
    rewindable = context.model.rewindable
    return Limits(
        n_slots=options.n_parallel,
        n_cells=fit.n_context if unified else n_context,
        n_context=n_context,
        n_step_tokens=context.n_ubatch,
        unified=unified,
        deterministic=options.deterministic,
        n_ids=native.MAX_SEQUENCES if rewindable else options.n_parallel,
        rewindable=rewindable,
        n_outputs=context.options.n_outputs,
    )


def _info(
    options: ModelOptions,
    file: GgufFile,
    outline: ModelOutline,
    model: native.Model,
    fit: Fit,
    n_context: int,
    unified: bool,
    template: ChatTemplate | None,
) -> ModelInfo:
    return ModelInfo(
        path=options.path,
        name=safe_line(outline.name, 60) or safe_line(model_stem(options.path), 60),
        architecture=outline.architecture,
        n_context=n_context,
        n_context_trained=outline.n_context,
        n_vocab=model.n_vocab,
        n_parameters=model.n_parameters,
        n_bytes=model.n_bytes,
        n_routed_experts=outline.n_routed_experts,
        n_experts_per_token=outline.n_experts_per_token,
        n_choosable_experts=outline.n_choosable_experts,
        n_threads=options.n_threads or physical_cores(),
        template=template.source if template else None,
        n_parallel=options.n_parallel,
        unified=unified,
        deterministic=options.deterministic,
        placement=fit.placement.describe(),
        template_text=template.text if template else None,
        vocabulary=_vocabulary(file),
        type=file_type_name(file),
    )


def _vocabulary(file: GgufFile) -> str:
    """Return a digest of the tokenizer's metadata."""
    digest = blake2b(digest_size=16)
    for key, field in sorted(file.metadata.items()):
        if key.startswith(_TOKENIZER) and not key.startswith(_TEMPLATES):
            digest.update(repr((key, field.value)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _kernel_choice(
    options: ModelOptions, file: GgufFile, fit: Fit, listen: progress.Listener
) -> KernelChoice:
    """Choose the form of the weights. Raises UsageError if replies would not be deterministic with it."""
    tensors = list(file.tensors.values())
    wanted = Kernels(options.kernels)
    offloaded = fit.placement.n_gpu_layers > 0
    if fit.paged:
        # Repacked weights are a copy, which the system cannot drop and read from the file again.
        choice = plain("the model is larger than the memory")
    elif options.deterministic and wanted is Kernels.AUTO:
        # The choice must not depend on the work that is left.
        choice = replace(choose_kernels(Kernels.REPACK, tensors, offloaded=offloaded), reason="deterministic")
    else:
        measured, note = read_speeds(options.path) if wanted is Kernels.AUTO and not offloaded else ({}, "")
        if note:
            listen(progress.Note(note))
        choice = choose_kernels(
            wanted, tensors, offloaded=offloaded, prompt_ratio=options.prompt_ratio, measured=measured
        )
    if options.deterministic and not offloaded:
        check_deterministic(choice, tensors, options.n_parallel)
    return choice


def _arithmetic(options: ModelOptions, fit: Fit, kernels: KernelChoice) -> str:
    """Return where and how tensors are computed."""
    cache = "" if options.offload_cache or not fit.placement.devices else ", KV cache on the CPU"
    attention = {"on": ", flash attention", "off": ", plain attention"}.get(fit.flash_attention, "")
    return f"{fit.placement.compute_text()}{cache}, {kernels.about}{attention}"


def _cache_identity(options: ModelOptions, outline: ModelOutline, arithmetic: str, file: str) -> str:
    """Return `ModelInfo.cache_identity`.

    It excludes the batch sizes, the threads and the context length, which do not change the meaning of a
    cell.
    """
    parts = (
        file,
        outline.n_experts_per_token,
        options.cache_type_k,
        options.cache_type_v,
        arithmetic,
        native.VERSION,
    )
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _unified(options: ModelOptions) -> bool:
    """Return True if all sequences share one KV cache. Raises UsageError if `deterministic` forbids it."""
    if options.deterministic and options.unified:
        raise UsageError(
            "deterministic decoding requires a separate KV cache for each sequence",
            remedy="do not set unified, or do not set deterministic",
        )
    return not options.deterministic and (options.unified is None or options.unified)


def _context_per_request(n_parallel: int, unified: bool, n_context: int, n_trained: int) -> int:
    """Return the largest number of tokens of one request. `n_context` are the tokens of the whole cache."""
    share = n_context // n_parallel
    return min(n_context, max(n_trained, share)) if unified else share


def _note_long_context(n_context: int, n_trained: int, listen: progress.Listener) -> None:
    # One token more needs no warning: the last generated token is never decoded.
    if n_context > n_trained + 1:
        listen(progress.Note(f"the model was trained for {n_trained} tokens of context, not {n_context}"))


def context_options(
    options: ModelOptions,
    flash_attention: str,
    n_context: int,
    *,
    unified: bool,
    eval_callback: object = None,
) -> native.ContextOptions:
    """Return the options of a context of `n_context` tokens. `flash_attention` replaces that of `options`."""
    # A batch must have room for one token of every sequence and one of a prompt.
    n_batch = max(min(options.n_batch, n_context), options.n_parallel + 1)
    n_ubatch = min(options.n_ubatch, n_batch)
    threads = options.n_threads or physical_cores()
    return native.ContextOptions(
        n_context=n_context,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=threads,
        n_threads_batch=options.n_threads_batch or threads,
        flash_attention=flash_attention,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        n_sequences=options.n_parallel,
        unified=unified,
        offload_cache=options.offload_cache,
        n_outputs=n_outputs(
            options.observers, n_ubatch, options.n_parallel, scores_prompts=options.scores_prompts
        ),
        eval_callback=eval_callback,
    )


def _check(options: ModelOptions) -> None:
    """Check the options that do not depend on the model. Raises UsageError."""
    check_observers(options.observers)
    native.check_modes(options.cache_type_k, options.cache_type_v, options.flash_attention)
    for flag, value, least, most in (
        ("-c", options.n_context, MIN_CONTEXT, _MAX_TOKENS),
        ("-b", options.n_batch, 1, _MAX_TOKENS),
        ("-ub", options.n_ubatch, 1, _MAX_TOKENS),
        ("-t", options.n_threads, 1, _MAX_THREADS),
        ("-tb", options.n_threads_batch, 1, _MAX_THREADS),
        ("-ngl", options.n_gpu_layers, ALL_LAYERS, _MAX_TOKENS),
        ("--n-cpu-moe", options.n_cpu_moe, ALL_LAYERS, _MAX_TOKENS),
        ("--parallel", options.n_parallel, 2 if options.deterministic else 1, _MAX_PARALLEL),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"{flag} {value} is out of range", remedy=f"it takes {least} to {most}")


def _n_experts(options: ModelOptions, outline: ModelOutline) -> int:
    wanted = options.n_experts_per_token
    if wanted is None:
        return outline.n_experts_per_token
    if not isinstance(outline, Hyperparameters):
        raise no_table("--active-experts", outline.architecture, options.path)
    if not outline.is_moe:
        raise UsageError(
            "--active-experts: the model has no experts", where=str(options.path), remedy="leave it out"
        )
    if not 1 <= wanted <= outline.n_choosable_experts:
        groups = f", in {outline.n_groups_per_token} groups" if outline.n_expert_groups > 1 else ""
        chosen_from = f"{outline.n_choosable_experts}{groups}"
        raise UsageError(
            f"--active-experts {wanted} is out of range",
            where=str(options.path),
            remedy=f"a token uses {outline.n_experts_per_token}, chosen from {chosen_from}",
        )
    return wanted


def _check_cache_types(options: ModelOptions, outline: ModelOutline) -> None:
    """Raise UsageError if keys and values of an MLA model, which share memory, are given different types."""
    key_type, value_type = options.cache_type_k, options.cache_type_v
    if isinstance(outline, Hyperparameters) and outline.is_mla and key_type != value_type:
        raise UsageError(
            f"-ctk {key_type} -ctv {value_type}: the model stores keys and values together, in one type",
            where=str(options.path),
            remedy=f"-ctk {key_type} -ctv {key_type}",
        )


def _check_rewindable(options: ModelOptions, outline: ModelOutline, model: native.Model) -> None:
    if options.deterministic and not model.rewindable:
        raise UsageError(
            f"deterministic decoding is not possible with {outline.architecture}, a recurrent model",
            where=options.path,
            remedy="do not set deterministic",
        )


def _template(options: ModelOptions, file: GgufFile, outline: ModelOutline) -> ChatTemplate | None:
    """Compile the chat template before the weights are loaded, so that errors are reported early.

    The texts of BOS and EOS are set later, by `bind`.
    """
    found = template_of(options, file, outline)
    return None if found is None else ChatTemplate(*found)


def _load_weights(
    options: ModelOptions,
    file: GgufFile,
    outline: ModelOutline,
    fit: Fit,
    kernels: KernelChoice,
    listen: progress.Listener,
    stop: threading.Event,
) -> native.Model:
    done = 0

    def report(fraction: float) -> bool:
        nonlocal done
        now = int(fraction * file.size)
        listen(progress.Advanced(now - done))
        done = now
        return not stop.is_set()

    listen(progress.Started(f"loading {safe_line(options.path.name, 60)}", file.size))
    try:
        return native.Model(
            options.path,
            n_gpu_layers=fit.placement.n_gpu_layers,
            devices=fit.placement.devices,
            split=fit.placement.split,
            overrides=fit.placement.overrides,
            mapped=fit.mapped,
            repack=kernels.repack_all,
            repacked=kernels.repacked,
            n_experts_per_token=options.n_experts_per_token,
            architecture=outline.architecture,
            progress=report,
        )
    finally:
        listen(progress.Finished("loading"))
