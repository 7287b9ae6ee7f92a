"""Loading: progress, notes, refusals that are short errors, and nothing on the screen."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support.models import family_model, tiny_model

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError, InterruptedRunError, UsageError
from dsmoe_local.base.progress import Advanced, Event, Finished, Listener, Note, Started
from dsmoe_local.engine import native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import ModelLoadError, OutOfMemoryError, TemplateError
from dsmoe_local.engine.load import fit, loaded_model
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.types import ALL_LAYERS, PROMPTS_ONLY, ModelOptions, Request


def test_progress_adds_up_and_the_log_stays_off_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    """Guards: a progress bar that never fills; llama.cpp's log on the screen."""
    events: list[Event] = []
    with Engine.load(ModelOptions(tiny_model()), events.append) as engine:
        assert engine.info.n_context == 256
        assert any("llama" in line for line in engine.log())
    kinds = [type(event) for event in events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    started = events[0]
    assert isinstance(started, Started)
    assert sum(event.amount for event in events if isinstance(event, Advanced)) == started.total
    assert capfd.readouterr() == ("", "")


def test_loading_can_be_given_up() -> None:
    """Guards: Ctrl-C that waits until 10 GB are loaded."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        Engine.load(ModelOptions(tiny_model()), stop=stop)
    with Engine.load(ModelOptions(tiny_model())):
        pass


@pytest.mark.parametrize("error", [InterruptedRunError, KeyboardInterrupt])
def test_interruption_when_loading_is_over(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Guards: a Ctrl-C that is ignored, and one that waits for ever for an idle thread."""

    def interrupted(
        options: ModelOptions, listen: Listener, stop: threading.Event
    ) -> loaded_model.LoadedModel:
        loaded = loaded_model.load_model(options, listen, threading.Event())
        stop.set() if error is InterruptedRunError else press_ctrl_c(stop)
        return loaded

    def press_ctrl_c(stop: threading.Event) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert stop.wait(60)

    monkeypatch.setattr("dsmoe_local.engine.engine.load_model", interrupted)
    with pytest.raises(error):
        Engine.load(ModelOptions(tiny_model()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_type_k": "q3_k"}, "-ctk q3_k"),
        ({"flash_attention": "off", "cache_type_v": "q8_0"}, "quantized V"),
        ({"n_context": 8}, "-c 8"),
        ({"n_context": 2**40}, "it takes 32 to 16777215"),
        ({"n_gpu_layers": -2}, "-ngl -2"),
        ({"n_cpu_moe": -2}, "--n-cpu-moe -2"),
        ({"tensor_overrides": (("(", "CPU"),)}, "not a regular expression"),
        ({"n_threads": 0}, "-t 0"),
        ({"n_threads": 99_999}, "1 to 512"),
        ({"n_threads_batch": 99_999}, "-tb 99999"),
        ({"n_ubatch": 0}, "-ub 0"),
        ({"chat_template": "no-such"}, "no-such"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    """Guards: options that llama.cpp refuses late, or aborts on."""
    with pytest.raises(UsageError) as refusal:
        Engine.load(ModelOptions(tiny_model(), **options))
    assert message in str(refusal.value)


def test_bad_files_never_reach_native_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: llama.cpp aborting the process on a malformed file."""
    monkeypatch.setattr(native, "Model", lambda *_, **__: pytest.fail("reached native code"))
    whole = tiny_model().read_bytes()
    cases = {"cut": whole[: len(whole) // 2], "empty": b"", "zip": b"PK\3\4" + b"\0" * 999}
    for name, content in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises((FormatError, FileError)):
            Engine.load(ModelOptions(path))
    with pytest.raises(FileError):
        Engine.load(ModelOptions(tmp_path / "missing.gguf"))
    with pytest.raises(DsmoeError):
        Engine.load(ModelOptions(tmp_path))


def test_what_llama_cpp_refuses_names_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards: 'failed to load model' without the cause, which only the log holds."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_model().read_bytes().replace(b"deepseek-llm", b"deepseek-xxx"))
    with pytest.raises(ModelLoadError) as refusal:
        Engine.load(ModelOptions(bad))
    assert "pre-tokenizer" in str(refusal.value)


def test_memory_notes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a context that is reduced without a note; a paged model that is refused."""
    events: list[Event] = []
    monkeypatch.setattr(fit, "available_memory", lambda: 96 * 2**20 + 1_200_000)
    with Engine.load(ModelOptions(tiny_model(), n_context=256, n_ubatch=8), events.append) as engine:
        notes = [event.text for event in events if isinstance(event, Note)]
        assert any("paged from disk" in note for note in notes)
        assert engine.info.kernels.endswith("weights as in the file, steps of 8 tokens")
        assert list(engine.submit(Request("r", "a", max_tokens=2)))


@pytest.mark.parametrize(
    ("options", "megabytes", "expected"),
    [
        ({}, 9000, ", plain attention"),
        ({"flash_attention": "on"}, 9000, ", flash attention"),
        ({"prompt_ratio": PROMPTS_ONLY}, 9000, ""),
        ({"flash_attention": "off", "n_context": 8192}, 300, ", plain attention"),
        ({"n_context": 8192}, 300, ""),
        ({"n_parallel": 2}, 9000, ""),
    ],
)
def test_attention_is_plain_for_one_sequence_if_memory_allows_it(
    options: dict[str, Any], megabytes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: scores of 64 MB in 300 MB of memory; batches at half the speed; the user's choice ignored."""
    monkeypatch.setattr(fit, "available_memory", lambda: megabytes << 20)
    with Engine.load(ModelOptions(tiny_model(), **options)) as engine:
        assert re.search(rf"weights (repacked|as in the file){expected}, steps of", engine.info.kernels)


def test_scores_that_do_not_fit_are_no_reason_to_refuse_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: out of memory with plain attention, where flash attention fits."""
    monkeypatch.setattr(fit, "available_memory", lambda: 100 << 20)
    with pytest.raises(OutOfMemoryError):
        Engine.load(ModelOptions(tiny_model(), n_context=512, flash_attention="off"))
    with Engine.load(ModelOptions(tiny_model(), n_context=512)) as engine:
        assert engine.info.n_context == 512


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"n_gpu_layers": 99}, ["no GPU in this build of llama.cpp: -ngl has no effect"]),
        (
            {
                "n_gpu_layers": ALL_LAYERS,
                "n_cpu_moe": ALL_LAYERS,
                "tensor_overrides": (("attn", "CUDA0"),),
                "devices": ("CUDA0",),
            },
            [
                (
                    "no GPU in this build of llama.cpp: -ngl, --n-cpu-moe, --tensor-override, --device "
                    "have no effect"
                )
            ],
        ),
        ({"n_gpu_layers": 0, "n_cpu_moe": 0, "devices": ()}, []),
        ({}, []),
    ],
)
def test_no_gpu_is_said_once(
    options: dict[str, Any], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: options for GPUs failing, or silently doing nothing, on a CPU-only build."""
    monkeypatch.setattr(native, "offload_devices", lambda devices: ())
    events: list[Event] = []
    with Engine.load(ModelOptions(tiny_model(), **options), events.append) as engine:
        assert engine.info.placement.startswith("CPU: ")
        assert engine.info.kernels.startswith("all on the CPU, weights ")
        assert engine.info.kernels.endswith(", plain attention, steps of 256 tokens")
        assert any(engine.info.kernels_reason in line for line in native.log_lines())
    assert [event.text for event in events if isinstance(event, Note)] == notes


def test_a_template_that_is_none_is_told_before_the_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: gigabytes that are loaded before a typing error is reported."""
    monkeypatch.setattr(native, "Model", lambda *_, **__: pytest.fail("loaded the model"))
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }")
    with pytest.raises(TemplateError):
        Engine.load(ModelOptions(tiny_model(), chat_template=str(template)))


def test_a_refused_model_leaves_no_process_of_its_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a template's process that stays alive while the error is referenced."""
    made: list[ChatTemplate] = []

    def make(text: str, source: str) -> ChatTemplate:
        made.append(ChatTemplate(text, source))
        return made[-1]

    def refuse(*_: object) -> None:
        raise ModelLoadError("not this one")

    monkeypatch.setattr(loaded_model, "ChatTemplate", make)
    monkeypatch.setattr(loaded_model, "_load_weights", refuse)
    with pytest.raises(ModelLoadError, match="not this one"):
        Engine.load(ModelOptions(tiny_model(), chat_template="chatml"))
    assert [template._renderer._process for template in made] == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_type_k": "q8_0"}, "keys and values together, in one type\n.*\n-ctk q8_0 -ctv q8_0"),
        ({"n_experts_per_token": 5}, "out of range\n.*\na token uses 3, chosen from 4, in 2 groups"),
    ],
)
def test_what_a_model_with_mla_and_groups_cannot_do(options: dict[str, Any], message: str) -> None:
    """Guards: an error of llama.cpp about a context; experts chosen from groups that are masked."""
    with pytest.raises(UsageError, match=message):
        Engine.load(ModelOptions(family_model("deepseek2"), **options))
    with Engine.load(ModelOptions(family_model("deepseek2"), n_experts_per_token=4)) as engine:
        assert (engine.info.n_experts_per_token, engine.info.n_choosable_experts) == (4, 4)


@pytest.mark.parametrize(("n_context", "is_told"), [(512, True), (258, True), (257, False), (256, False)])
def test_context_beyond_training_is_said(n_context: int, is_told: bool) -> None:
    """Guards: a context beyond the trained one without a warning; a warning for one token more."""
    events: list[Event] = []
    with Engine.load(ModelOptions(tiny_model(), n_context=n_context), events.append) as engine:
        assert engine.info.n_context == n_context
    told = [event.text for event in events if isinstance(event, Note)]
    assert any("trained for 256" in text for text in told) is is_told


@pytest.mark.parametrize(
    "failing",
    [
        "load.loaded_model.exact_identity",
        "load.loaded_model.Dispatcher",
        "load.loaded_model.native.Context",
        "load.loaded_model.PromptEncoder",
        "load.loaded_model._info",
        "load.loaded_model._cache_identity",
        "load.loaded_model.Limits",
        "load.loaded_model.LoadedModel",
        "engine.Core",
    ],
)
def test_a_load_that_fails_late_gives_everything_back(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: weights and a thread that are never freed when the last steps of loading fail."""
    made: list[native.Model | native.Context] = []
    threads = set(threading.enumerate())

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    def kept(make: Any) -> Any:
        def make_and_keep(*arguments: Any, **more: Any) -> Any:
            made.append(make(*arguments, **more))
            return made[-1]

        return make_and_keep

    for name in ("Model", "Context"):
        monkeypatch.setattr(native, name, kept(getattr(native, name)))
    monkeypatch.setattr(f"dsmoe_local.engine.{failing}", fail)
    with pytest.raises(MemoryError, match="no room"):
        Engine.load(ModelOptions(tiny_model()))
    assert made
    assert not any(one.handle for one in made)
    assert set(threading.enumerate()) <= threads
