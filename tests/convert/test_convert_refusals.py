"""Malformed, hostile and incomplete checkpoints: each gets a short error that names the culprit."""

from __future__ import annotations

import json
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import TINY, random_weights, write_checkpoint, write_weights

from dsmoe_convert.checkpoint import open_checkpoint
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.errors import CheckpointError
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.base.progress import Event, Note

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def refused(folder: Path, out: Path, *words: str, **options: Any) -> DsmoeError:
    """The error of a conversion, which must have at most three short lines and leave nothing behind."""
    with pytest.raises(DsmoeError) as caught:
        convert_folder(folder, out, ConvertOptions(**options))
    text = str(caught.value)
    for word in words:
        assert word in text
    assert len(text.splitlines()) <= 3
    assert all(character.isprintable() for line in text.splitlines() for character in line)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return caught.value


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


ROUTED = "model.layers.1.mlp.experts.3.up_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"

WEIGHTS: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing expert": (lambda w: w.pop(ROUTED), (ROUTED, "missing")),
    "missing norm": (lambda w: w.pop("model.norm.weight"), ("model.norm.weight", "missing")),
    "missing output": (lambda w: w.pop("lm_head.weight"), ("lm_head.weight", "missing")),
    "attention bias": (
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ("q_proj.bias", "not part of"),
    ),
    "one expert too many": (
        lambda w: w.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(32, 64)}),
        ("experts.8.up_proj", "not part of"),
    ),
    "hostile name": (lambda w: w.update({"\x1b[2Jx\u202e": torch.zeros(1)}), ("not part of",)),
    "wrong shape": (lambda w: w.update({QUERY: torch.zeros(64, 32)}), (QUERY, "[64, 32]", "[64, 64]")),
    "transposed expert": (lambda w: w.update({ROUTED: torch.zeros(64, 32)}), (ROUTED, "[32, 64]")),
    "flat vector": (lambda w: w.update({"model.norm.weight": torch.zeros(1, 64)}), ("model.norm.weight",)),
    "float64": (lambda w: w.update({QUERY: w[QUERY].double()}), (QUERY, "F64", "BF16")),
    "integers": (lambda w: w.update({QUERY: w[QUERY].to(torch.int8)}), (QUERY, "I8")),
    "float8": (lambda w: w.update({QUERY: w[QUERY].to(torch.float8_e4m3fn)}), (QUERY, "F8_E4M3")),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit(case: str, tmp_path: Path, out: Path) -> None:
    """A file that llama.cpp refuses late, or runs with wrong output."""
    change, words = WEIGHTS[case]
    weights = random_weights(TINY)
    change(weights)
    refused(write_checkpoint(tmp_path / "model", weights=weights, form="single"), out, *words)


def test_harmless_extras(tmp_path: Path, out: Path) -> None:
    """A checkpoint that is refused for what follows from the rest."""
    hp = replace(TINY, tied_embeddings=True)
    weights = random_weights(hp)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8, dtype=torch.float64)
    assert convert_folder(write_checkpoint(tmp_path / "model", hp, weights=weights), out).n_tensors == 37


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("word", [None, "Q8_0"])
def test_weights_that_are_not_finite(value: float, word: str | None, tmp_path: Path, out: Path) -> None:
    """NaN that ends up in a file, or an error that names the stacked tensor and not the damaged one."""
    weights = random_weights(TINY)
    weights[ROUTED][17, 5] = value
    write_checkpoint(tmp_path / "model", weights=weights, form="single")
    refused(tmp_path / "model", out, f"{ROUTED}[17, 5]", "NaN" if value != value else "infinite", type=word)


def test_nan_in_a_permuted_tensor(tmp_path: Path, out: Path) -> None:
    """An index that counts rows after the permutation, which nobody can look up in the checkpoint."""
    weights = random_weights(TINY)
    weights[QUERY][16 + 9, 5] = float("nan")
    refused(write_checkpoint(tmp_path / "model", weights=weights), out, f"{QUERY}[25, 5]")


def test_overflow_of_f16(tmp_path: Path, out: Path) -> None:
    """A weight that silently becomes infinite."""
    weights = random_weights(TINY)
    weights[QUERY][0, 0] = 1e6
    write_checkpoint(tmp_path / "model", weights=weights)
    refused(tmp_path / "model", out, QUERY, "too large for F16", type="f16")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        write_raw(path, json.dumps(header).encode(), data)

    return apply


def twice(path: Path) -> None:
    header, data = header_of(path)
    entry = json.dumps(header[QUERY])
    text = json.dumps(header)[:-1] + f', "{QUERY}": {entry}' + "}"
    write_raw(path, text.encode(), data)


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for entry in header.values() if entry.get("data_offsets", [1])[0] == 0)


HEADERS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the length": lambda path: path.write_bytes(b"\x01\x02"),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut in the data": lambda path: os.truncate(path, path.stat().st_size - 1),
    "trailing bytes": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "header of 2^63 bytes": lambda path: path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}"),
    "not JSON": lambda path: write_raw(path, b"{nonsense", b""),
    "not an object": lambda path: write_raw(path, b"[]", b""),
    "deep nesting": lambda path: write_raw(path, b'{"a":' + b"[" * 200_000, b""),
    "not UTF-8": lambda path: write_raw(path, b'{"\xff": 1}', b""),
    "a name twice": twice,
    "overlap": damaged(lambda h: h[QUERY].update(data_offsets=first(h)["data_offsets"])),
    "negative offset": damaged(lambda h: h[QUERY].update(data_offsets=[-4, 16380])),
    "reversed offsets": damaged(lambda h: h[QUERY].update(data_offsets=h[QUERY]["data_offsets"][::-1])),
    "offsets beyond the end": damaged(lambda h: h[QUERY].update(data_offsets=[1 << 40, (1 << 40) + 16384])),
    "shape of another size": damaged(lambda h: h[QUERY].update(shape=[64, 65])),
    "huge shape": damaged(lambda h: h[QUERY].update(shape=[1 << 40, 1 << 40])),
    "negative shape": damaged(lambda h: h[QUERY].update(shape=[-64, -64])),
    "an unknown type": damaged(lambda h: h[QUERY].update(dtype="F31")),
    "an entry that is no object": damaged(lambda h: h.update({QUERY: [1, 2]})),
    "an entry without offsets": damaged(lambda h: h[QUERY].pop("data_offsets")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_safetensors(case: str, tmp_path: Path, out: Path) -> None:
    """A header that reads outside the file, allocates by its own word, or hides a second tensor."""
    folder = write_checkpoint(tmp_path / "model", form="single")
    HEADERS[case](folder / "model.safetensors")
    refused(folder, out, "model.safetensors")


def reindex(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def place(shard: object) -> Callable[[Path], None]:
    return reindex(lambda index: index["weight_map"].update({QUERY: shard}))


INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent folder": (place("../model-00001-of-00003.safetensors"), "accepted: names"),
    "absolute path": (place("/etc/passwd.safetensors"), "accepted: names"),
    "subfolder": (place("a/model-00001-of-00003.safetensors"), "accepted: names"),
    "backslash": (place("..\\model.safetensors"), "accepted: names"),
    "another suffix": (place("config.json"), "accepted: names"),
    "dots": (place("..safetensors"), "accepted: names"),
    "a control character": (place("a\x00b.safetensors"), "accepted: names"),
    "a number": (place(7), "accepted: names"),
    "an absent shard": (place("model-00009-of-00003.safetensors"), "is missing"),
    "the wrong shard": (place("model-00003-of-00003.safetensors"), "missing in"),
    "a tensor left out": (reindex(lambda index: index["weight_map"].pop(QUERY)), "does not list"),
    "a tensor that is nowhere": (
        reindex(lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors")),
        "missing in",
    ),
    "no weight map": (reindex(lambda index: index.pop("weight_map")), "weight_map"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "JSON object"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
    "a shard that is gone": (lambda folder: next(folder.glob("*00002*")).unlink(), "is missing"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index(case: str, tmp_path: Path, out: Path) -> None:
    """An index that leads out of its folder, or disagrees with its shards."""
    change, word = INDEXES[case]
    folder = write_checkpoint(tmp_path / "model")
    change(folder)
    refused(folder, out, word)


def test_symlinked_shards_are_fine(tmp_path: Path, out: Path) -> None:
    """The hub's cache, whose files are links into another folder."""
    folder = write_checkpoint(tmp_path / "model")
    for shard in folder.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    assert convert_folder(folder, out).n_tensors == 38


def test_code_in_the_checkpoint_is_never_run(tmp_path: Path, out: Path) -> None:
    """auto_map and a modeling file beside the weights."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    automap = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
    folder = write_checkpoint(tmp_path / "model", auto_map=automap)
    for name in ("modeling_deepseek.py", "configuration_deepseek.py", "torch.py", "tokenizers.py"):
        (folder / name).write_text(code)
    convert_folder(folder, out)
    assert not (tmp_path / "ran").exists()


def test_empty_folder(tmp_path: Path, out: Path) -> None:
    """A folder without a configuration, weights or tokenizer: which is missing must be said."""
    refused(tmp_path, out, "config.json")
    folder = write_checkpoint(tmp_path / "model", form="single")
    (folder / "tokenizer.json").rename(folder / "kept")
    refused(folder, out, "tokenizer.json")
    (folder / "kept").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    refused(folder, out, "no weights")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", True),
        ("scoring_func", "sigmoid"),
        ("attention_bias", True),
        ("moe_layer_freq", 2),
        ("model_type", "deepseek_v9"),
        ("model_type", "llama"),
    ],
)
def test_configurations_that_the_graph_cannot_honour(key: str, value: Any, tmp_path: Path, out: Path) -> None:
    """A silent conversion that would give wrong output."""
    refused(write_checkpoint(tmp_path / "model", **{key: value}), out, key, "config.json")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_checkpoints_that_are_quantized_already(method: str, tmp_path: Path, out: Path) -> None:
    """Packed weights, taken for what they are not or refused for their names: the reason was not said."""
    folder = write_checkpoint(tmp_path / "model", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, out, f"quantized already ({method})", "config.json: quantization_config", "original")


def test_no_quantization(tmp_path: Path, out: Path) -> None:
    """A key that says nothing, taken for a refusal."""
    assert convert_folder(write_checkpoint(tmp_path / "model", quantization_config=None), out).n_tensors == 38


def test_mixed_precision_is_told(tmp_path: Path, out: Path) -> None:
    """Matrices that lose bits without a word."""
    weights = random_weights(TINY, dtype=torch.bfloat16)
    weights[QUERY] = weights[QUERY].float()
    notes: list[Event] = []
    folder = write_checkpoint(tmp_path / "model", weights=weights)
    convert_folder(folder, out, None, RunOptions(listen=notes.append))
    assert any(isinstance(note, Note) and "blk.1.attn_q" in note.text for note in notes)


def test_mixed_experts(tmp_path: Path, out: Path) -> None:
    """Experts of one layer in two float types, read as if they were one."""
    weights = random_weights(TINY, dtype=torch.bfloat16)
    weights[ROUTED] = weights[ROUTED].float()
    refused(write_checkpoint(tmp_path / "model", weights=weights), out, ROUTED, "BF16")


class Payload:
    """What a malicious pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def bin_checkpoint(folder: Path, save: Callable[[Path], object]) -> Path:
    write_checkpoint(folder, form="bin")
    (folder / "pytorch_model.bin").unlink()
    save(folder / "pytorch_model.bin")
    return folder


def test_pickles_need_permission(tmp_path: Path, out: Path) -> None:
    """A .bin file that is opened without --allow-pickle."""
    ran = tmp_path / "ran"
    folder = bin_checkpoint(tmp_path / "model", lambda path: path.write_bytes(pickle.dumps(Payload(ran))))
    refused(folder, out, "--allow-pickle")
    assert not ran.exists()


def test_malicious_pickles(tmp_path: Path, out: Path) -> None:
    """Code in a pickle, in the zip format and in the old one."""
    ran = tmp_path / "ran"
    for save in (
        lambda path: path.write_bytes(pickle.dumps(Payload(ran))),
        lambda path: torch.save({"x": Payload(ran)}, path),
    ):
        refused(bin_checkpoint(tmp_path / "model", save), out, "not a usable .bin file", allow_pickle=True)
        assert not ran.exists()


def recompress(path: Path) -> None:
    torch.save(random_weights(TINY), path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)


BINS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sparse": (lambda path: torch.save({"x": torch.eye(4).to_sparse()}, path), "not dense"),
    "transposed": (lambda path: torch.save({"x": torch.randn(4, 8).T}, path), "not dense"),
    "not tensors": (lambda path: torch.save({"x": [1, 2]}, path), "not a tensor"),
    "a list": (lambda path: torch.save([torch.zeros(2)], path), "dictionary"),
    "cut short": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), ".bin"),
    "compressed": (recompress, ".bin"),
}


@pytest.mark.parametrize("case", BINS)
def test_bin_files_that_are_refused(case: str, tmp_path: Path, out: Path) -> None:
    """A tensor whose bytes do not lie in the file as its shape says."""
    save, word = BINS[case]
    refused(bin_checkpoint(tmp_path / "model", save), out, word, allow_pickle=True)


def test_interrupted_pickle(tmp_path: Path) -> None:
    """Ctrl-C that waits for seven children, each loading torch."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.zeros(3)}, path)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        open_checkpoint(tmp_path, allow_pickle=True, stop=stop)


def test_bin_with_shared_storage(tmp_path: Path) -> None:
    """Tensors that share a storage, or are views into one: their offsets must be found all the same."""
    base = torch.arange(100, dtype=torch.float32)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"all": base, "part": base[10:20].view(2, 5), "other": torch.ones(3)}, path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    part = checkpoint.tensors["part"]
    raw = path.read_bytes()[part.offset : part.offset + part.n_bytes]
    assert raw == base[10:20].numpy().tobytes()
    assert part.shape == (2, 5)


def test_a_shard_that_shrinks(tmp_path: Path) -> None:
    """A checkpoint that changes under the reader."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_weights(folder, {"x": torch.arange(64.0)}, "single")
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.shards.read_into(checkpoint.tensors["x"], 0, memoryview(bytearray(256)))
    checkpoint.shards.close()
