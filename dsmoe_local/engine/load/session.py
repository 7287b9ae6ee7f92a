"""From options to a session: the strict reader, the memory plan, llama.cpp's own load, told as progress."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b

from dsmoe_local.base import progress
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine import native
from dsmoe_local.engine.load.fit import Fit, fit_model
from dsmoe_local.engine.load.machine import available_memory, physical_cores
from dsmoe_local.engine.load.memory import BufferOptions, buffer_bytes
from dsmoe_local.engine.load.prefetch import page_experts
from dsmoe_local.engine.observe.dispatcher import Dispatcher
from dsmoe_local.engine.observe.registry import check_observers, n_outputs
from dsmoe_local.engine.prompts.choice import template_of
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.schedule.plan import Limits
from dsmoe_local.engine.session import Session
from dsmoe_local.engine.types import ALL_LAYERS, ModelInfo, ModelOptions
from dsmoe_local.model.gguf_file import GgufFile
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.hyperparameters import Hyperparameters
from dsmoe_local.model.identity import exact_identity
from dsmoe_local.model.type_name import file_type_name

_SMALLEST_REQUEST = 32
_MOST_TOKENS = (1 << 24) - 1
_MOST_PARALLEL = native.MAX_SEQUENCES // 2  # as many ids again are for parked prefixes
_TOKENIZER = "tokenizer."
_TEMPLATES = "tokenizer.chat_template"
_MOST_THREADS = 512  # ggml's own limit; where threads run out, OpenMP ends the process


def load_session(options: ModelOptions, listen: progress.Listener, stop: threading.Event) -> Session:
    """See `Engine.load`."""
    _check(options)
    file, hp = read_model(options.path)
    hp = replace(hp, n_experts_per_token=_n_experts(options, hp))
    unified = _unified(options)
    wanted = _context_options(options, options.n_context or hp.n_context, unified)
    fit = fit_model(options, file, hp, _buffer_options(wanted), wanted)
    for note in fit.notes:
        listen(progress.Note(note))
    n_context = _context_of_one(options.n_parallel, unified, fit.n_context, hp.n_context)
    # One more, as for a window of that length, is a place for a token that is never read.
    if n_context > hp.n_context + 1:
        listen(progress.Note(f"the model was trained for {hp.n_context} tokens of context, not {n_context}"))
    with ExitStack() as made:
        template = _template(options, file, hp)
        if template is not None:
            made.callback(template.close)
        model = _load_model(options, file, hp, fit, listen, stop)
        made.callback(model.close)
        # Also of the header that was checked: no other file can have taken its place meanwhile.
        identity = exact_identity(file)
        if template is not None:
            template.bind(bos=model.text_of(model.bos), eos=model.text_of(model.eos))
        own = []
        if fit.paged:
            budget = available_memory() - buffer_bytes(hp, _buffer_options(wanted), fit.n_context)
            own = [page_experts(file, hp, fit.placement, budget, listen, stop)]
        observers = Dispatcher(options.observers, model, hp, own=own)
        made.callback(observers.close)
        context = native.Context(
            model, _context_options(options, fit.n_context, unified, observers.eval_callback)
        )
        made.callback(context.close)
        encoder = PromptEncoder(model, template, n_context)
        made.callback(encoder.close)
        info = _info(options, file, hp, model, fit, n_context, unified, context.n_ubatch, template)
        session = Session(
            replace(info, cache_identity=_cache_identity(options, hp, fit, identity)),
            model,
            context,
            encoder,
            observers,
            _limits(options, fit, n_context, unified, context.n_ubatch),
        )
        made.pop_all()  # the session's to close, from here on
    return session


def _limits(options: ModelOptions, fit: Fit, n_context: int, unified: bool, n_step: int) -> Limits:
    return Limits(
        n_slots=options.n_parallel,
        n_cells=fit.n_context if unified else n_context,
        n_context=n_context,
        n_step_tokens=n_step,
        unified=unified,
        deterministic=options.deterministic,
        n_ids=native.MAX_SEQUENCES,
    )


def _info(
    options: ModelOptions,
    file: GgufFile,
    hp: Hyperparameters,
    model: native.Model,
    fit: Fit,
    n_context: int,
    unified: bool,
    n_step: int,
    template: ChatTemplate | None,
) -> ModelInfo:
    return ModelInfo(
        path=options.path,
        name=safe_line(hp.name, 60) or safe_line(options.path.stem, 60),
        architecture=hp.architecture,
        n_context=n_context,
        n_context_trained=hp.n_context,
        n_vocab=model.n_vocab,
        n_parameters=model.n_parameters,
        n_bytes=model.n_bytes,
        n_routed_experts=hp.n_routed_experts,
        n_experts_per_token=hp.n_experts_per_token,
        n_threads=options.n_threads or physical_cores(),
        template=template.source if template else None,
        n_parallel=options.n_parallel,
        unified=unified,
        deterministic=options.deterministic,
        placement=fit.placement.describe(),
        kernels=_kernels(options, fit, n_step),
        template_text=template.text if template else None,
        vocabulary=_vocabulary(file),
        type=file_type_name(file),
    )


def _vocabulary(file: GgufFile) -> str:
    """A digest of all that makes token ids of text, and text of them."""
    digest = blake2b(digest_size=16)
    for key, field in sorted(file.metadata.items()):
        if key.startswith(_TOKENIZER) and not key.startswith(_TEMPLATES):
            digest.update(repr((key, field.value)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _kernels(options: ModelOptions, fit: Fit, n_step: int) -> str:
    """What this machine, and its free memory, decided of the arithmetic, and of how the work is cut."""
    return f"{_arithmetic(options, fit)}, steps of {n_step} tokens"


def _arithmetic(options: ModelOptions, fit: Fit) -> str:
    cache = "" if options.offload_cache or not fit.placement.devices else ", KV cache on the CPU"
    weights = "as in the file" if fit.paged else "repacked"
    return f"{fit.placement.computing()}{cache}, weights {weights}"


def _cache_identity(options: ModelOptions, hp: Hyperparameters, fit: Fit, file: str) -> str:
    """See ModelInfo. How the work is cut (steps, threads, the context) is not in it: in one session, too, it
    depends on what else runs and on what the cache held before.
    """
    parts = (
        file,
        hp.n_experts_per_token,
        options.cache_type_k,
        options.cache_type_v,
        options.flash_attention,
        _arithmetic(options, fit),
        native.VERSION,
    )
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _unified(options: ModelOptions) -> bool:
    """Whether all sequences share one pool of cells."""
    if options.deterministic and options.unified:
        raise UsageError("deterministic decoding needs a cache of its own for each sequence")
    return not options.deterministic and (options.unified is None or options.unified)


def _context_of_one(n_parallel: int, unified: bool, n_context: int, n_trained: int) -> int:
    """The most tokens that one request may use of `n_context` in all."""
    share = n_context // n_parallel
    return min(n_context, max(n_trained, share)) if unified else share


def _context_options(
    options: ModelOptions, n_context: int, unified: bool, eval_callback: object = None
) -> native.ContextOptions:
    # A step holds a token of every sequence, and one more of a prompt.
    n_batch = max(min(options.n_batch, n_context), options.n_parallel + 1)
    n_ubatch = min(options.n_ubatch, n_batch)
    threads = options.n_threads or physical_cores()
    return native.ContextOptions(
        n_context=n_context,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=threads,
        n_threads_batch=options.n_threads_batch or threads,
        flash_attention=options.flash_attention,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        n_sequences=options.n_parallel,
        unified=unified,
        offload_cache=options.offload_cache,
        n_outputs=n_outputs(options.observers, n_ubatch, options.n_parallel),
        eval_callback=eval_callback,
    )


def _buffer_options(context: native.ContextOptions) -> BufferOptions:
    return BufferOptions(
        n_ubatch=context.n_ubatch,
        flash_attention=context.flash_attention != "off",
        cache_type_k=context.cache_type_k,
        cache_type_v=context.cache_type_v,
        n_sequences=context.n_sequences,
        unified=context.unified,
        n_outputs=context.n_outputs,
    )


def _check(options: ModelOptions) -> None:
    """The options that need no model to be wrong."""
    check_observers(options.observers)
    native.check_modes(options.cache_type_k, options.cache_type_v, options.flash_attention)
    for flag, value, least, most in (
        ("-c", options.n_context, _SMALLEST_REQUEST, _MOST_TOKENS),
        ("-b", options.n_batch, 1, _MOST_TOKENS),
        ("-ub", options.n_ubatch, 1, _MOST_TOKENS),
        ("-t", options.n_threads, 1, _MOST_THREADS),
        ("-tb", options.n_threads_batch, 1, _MOST_THREADS),
        ("-ngl", options.n_gpu_layers, ALL_LAYERS, _MOST_TOKENS),
        ("--n-cpu-moe", options.n_cpu_moe, ALL_LAYERS, _MOST_TOKENS),
        ("--parallel", options.n_parallel, 2 if options.deterministic else 1, _MOST_PARALLEL),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"{flag} {value} is out of range", remedy=f"it takes {least} to {most}")


def _n_experts(options: ModelOptions, hp: Hyperparameters) -> int:
    wanted = options.n_experts_per_token
    if wanted is None:
        return hp.n_experts_per_token
    if not hp.is_moe:
        raise UsageError("--active-experts: the model is dense, it has no experts", where=str(options.path))
    if not 1 <= wanted <= hp.n_routed_experts:
        raise UsageError(
            f"--active-experts {wanted} is out of range",
            where=str(options.path),
            remedy=f"the model has {hp.n_routed_experts} routed experts and uses {hp.n_experts_per_token}",
        )
    return wanted


def _template(options: ModelOptions, file: GgufFile, hp: Hyperparameters) -> ChatTemplate | None:
    """The chat template, without the texts of BOS and EOS, which the weights' file tells once it is loaded; a
    malformed one is told before that.
    """
    found = template_of(options, file, hp)
    return None if found is None else ChatTemplate(*found)


def _load_model(
    options: ModelOptions,
    file: GgufFile,
    hp: Hyperparameters,
    fit: Fit,
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
            devices=fit.devices,
            split=fit.placement.split,
            overrides=fit.placement.overrides,
            mapped=fit.mapped,
            # Repacked weights are anonymous memory, which cannot be paged back to the file.
            repack=not fit.paged,
            n_experts_per_token=options.n_experts_per_token,
            architecture=hp.architecture,
            progress=report,
        )
    finally:
        listen(progress.Finished("loading"))
