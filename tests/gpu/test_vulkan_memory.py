"""Memory of a Vulkan device that runs out: what the user is told, and that the next load works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_gguf import MOE, write_tiny

from dsmoe_local.engine.errors import ModelLoadError
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import NO_TEMPLATE, ModelOptions, Request, SamplingParameters

pytestmark = pytest.mark.gpu

GREEDY = SamplingParameters(temperature=0)


def answer(engine: TextEngine) -> list[int]:
    events = engine.submit(Request("r", (0, 5, 6, 7), GREEDY, max_tokens=4))
    return [event.token_id for event in events if event.token_id is not None]


@pytest.mark.parametrize(("mebibytes", "what"), [(4, "cannot load"), (16, "cannot create a context")])
def test_a_load_that_does_not_fit(
    mebibytes: int, what: str, vulkan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a full device that ends the program, or whose error does not say what to do."""
    path = write_tiny(tmp_path / "moe.gguf", replace(MOE, n_context=4096))
    options = ModelOptions(path, n_context=4096, chat_template=NO_TEMPLATE, n_threads=1)
    with EngineClient.load(replace(options, devices=())) as client:
        # The driver refuses larger buffers by the same error as a device that is full.
        monkeypatch.setenv("GGML_VK_FORCE_MAX_BUFFER_SIZE", str(mebibytes << 20))
        with pytest.raises(ModelLoadError) as caught:
            client.reload(options)
        assert what in caught.value.what
        assert vulkan in caught.value.where
        assert "-ngl" in caught.value.remedy
        assert len(answer(client)) == 4
        monkeypatch.delenv("GGML_VK_FORCE_MAX_BUFFER_SIZE")
        client.reload(options)
        assert vulkan in client.info.placement
        assert len(answer(client)) == 4
        client.reload(replace(options, n_gpu_layers=0))
        assert vulkan not in client.info.placement
