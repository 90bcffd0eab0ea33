"""Checkpoints made to do harm: refused in words, nothing executed, nothing outside their folder touched."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from megagpt2.checkpoint import store
from megagpt2.checkpoint.disk import record_of
from megagpt2.checkpoint.formats.huggingface import INDEX, HuggingFace, Weights
from megagpt2.checkpoint.formats.pickles import NAMES, load_pickled
from megagpt2.checkpoint.load import open_checkpoint
from megagpt2.checkpoint.shards import INDEX as SLICES
from megagpt2.checkpoint.shards import SliceReader
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.model.parameters import Extent, Spec
from tests.support import foreign
from tests.support.models import dense_model, model_config, save_model
from tools.convert_checkpoint import main

CONFIG = model_config()
WORD = Spec("wte.weight", (CONFIG.vocabulary, CONFIG.width))


class Harm:
    """What a pickle of it does when it is loaded: make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_model(dense_model(CONFIG), CONFIG, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def agree(folder: Path) -> None:
    """Make the manifest agree with what is in the folder: whoever changes a file can change that too."""
    manifest = json.loads((folder / store.MANIFEST).read_text())
    manifest["files"] = {name: record_of(folder / name) for name in manifest["files"]}
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    store.verify(folder)


def weights_of(folder: Path) -> Path:
    (path,) = (folder / "model").glob("*.safetensors")
    return path


def test_a_pickle_in_place_of_a_tensor_file_is_not_opened(folder, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"wte.weight": Harm(marker)}, weights_of(folder))
    agree(folder)
    with pytest.raises(CheckpointError, match=r"model-.*safetensors is not a readable safetensors file"):
        open_checkpoint(folder, CONFIG).weight(Extent.whole(WORD), torch.float32)
    assert not marker.exists()


def header(entries: dict, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


NAME, SHAPE = "transformer.wte.weight", [CONFIG.vocabulary, CONFIG.width]
SIZE = 4 * CONFIG.vocabulary * CONFIG.width


@pytest.mark.parametrize(
    "content",
    [
        header({}, 2**60), header({}, 2**63), header({}, 2**40), b"", b"\0" * 7, header({}) + b"x" * 8,
        header({NAME: {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, 2**62]}}) + b"x" * 64,
        header({NAME: {"dtype": "F32", "shape": SHAPE, "data_offsets": [-4, SIZE - 4]}}) + b"x" * SIZE,
        header({NAME: {"dtype": "F32", "shape": SHAPE, "data_offsets": [SIZE, 0]}}) + b"x" * SIZE,
        header({NAME: {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, SIZE]}}) + b"x" * SIZE,
        header({
            NAME: {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, SIZE]},
            "transformer.wpe.weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, SIZE]},
        }) + b"x" * SIZE,
    ],
    ids=["long", "longest", "past-the-end", "empty", "short", "trailing", "far", "negative", "reversed", "overflow",
         "shared"],
)
def test_absurd_headers_are_refused(content, folder):
    weights_of(folder).write_bytes(content)
    agree(folder)
    with pytest.raises(CheckpointError, match=r"model-.*safetensors is not a readable safetensors file"):
        open_checkpoint(folder, CONFIG).weight(Extent.whole(WORD), torch.float32)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "model/../../outside"])
def test_a_manifest_that_leaves_its_folder_is_refused(name, folder):
    manifest = json.loads((folder / store.MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": ""}
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json names the file '.*', which lies outside the checkpoint"):
        store.verify(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    outside = tmp_path / "outside"
    shutil.copy(folder / "state.json", outside)
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"state.json is a link to .*outside"):
        store.verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../outside.safetensors"}, "lies outside the folder"), ({"file": "/etc/passwd"}, "lies outside"),
        ({"start": -5}, "whole numbers"), ({"stop": 2**70}, "elements 0 to"), ({"dim": 7}, "dim 7"),
        ({"ranges": [[0, 2**40]], "dim": 0}, "ranges"), ({"shape": [2, 2, 2]}, "shape"),
        ({"shape": "ab"}, "whole numbers"), ({"ranges": [[0, 1, 2]]}, "ValueError"),
        ({"padding": 1.5}, "whole numbers"),
    ],
)
def test_an_index_of_slices_that_makes_no_sense_is_refused(change, message, tmp_path):
    place = {"file": "rank_00000.safetensors", "shape": [4, 2], "dim": None, "ranges": [], "padding": 0, "start": 0,
             "stop": 8}
    (tmp_path / SLICES).write_text(json.dumps({"kinds": ["exp_avg"], "slices": {"a": [place | change]}}))
    with pytest.raises(CheckpointError, match=f"index.json is not an index of optimizer slices: .*{message}"):
        SliceReader(tmp_path)


def test_a_slice_of_another_size_than_its_index_says_is_refused(tmp_path):
    from safetensors.torch import save_file

    place = {"file": "rank_00000.safetensors", "shape": [4, 2], "dim": None, "ranges": [], "padding": 0, "start": 0,
             "stop": 8}
    (tmp_path / SLICES).write_text(json.dumps({"kinds": ["exp_avg"], "slices": {"a": [place]}}))
    save_file({"exp_avg/a": torch.zeros(4)}, tmp_path / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"exp_avg/a is torch.float32 \[4\], the index says fp32 \[8\]"):
        SliceReader(tmp_path).read("exp_avg", Spec("a", (4, 2)))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors"])
def test_an_index_of_weights_that_leaves_its_folder_is_refused(file, folder):
    path = folder / "model" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = file
    path.write_text(json.dumps(index))
    for opened in (lambda: Weights(folder / "model", CONFIG), lambda: HuggingFace(folder / "model")):
        with pytest.raises(CheckpointError, match="which lies outside the folder"):
            opened()


# Pickles of other programs.


@pytest.mark.parametrize("kind", ["nanogpt", "megatron", "deepspeed", "huggingface"])
def test_a_pickle_that_wants_more_is_refused_by_name(kind, tmp_path, capsys):
    """Wherever the conversions open one."""
    marker, source = tmp_path / "executed", tmp_path / "source"
    content = {"model": {"transformer.wte.weight": torch.zeros(2, 2)}, "harm": Harm(marker)}
    path = {
        "nanogpt": source, "megatron": source / "mp_rank_00/model_optim_rng.pt",
        "deepspeed": source / "mp_rank_00_model_states.pt", "huggingface": source / "pytorch_model.bin",
    }[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    if kind == "huggingface":
        (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    flags = ["--activation", "tanh"] if kind == "nanogpt" else []
    assert main(["--from", kind, "--to", "llmc", *flags, str(source), str(tmp_path / "out")]) == 2
    assert f"{path} wants posix.system, which could be any program" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nanogpt", "megatron", "deepspeed", "huggingface", "openai", "llmc", "megagpt2"])
@pytest.mark.parametrize("content", [[1, 2], {"model": 5, "module": [3], "param_shapes": 5, "model_args": []}, 7])
def test_nonsense_is_refused_in_words(kind, content, tmp_path, capsys):
    """Whatever a file holds that can be opened."""
    source = tmp_path / "source"
    path = {
        "nanogpt": source, "megatron": source / "mp_rank_00/model_optim_rng.pt", "llmc": source,
        "deepspeed": source / "mp_rank_00_model_states.pt", "huggingface": source / "pytorch_model.bin",
        "openai": source / "model.ckpt.index", "megagpt2": source / "manifest.json",
    }[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    for name, text in (("config.json", '{"model_type": [1]}'), ("hparams.json", '{"n_vocab": Infinity}'),
                       ("manifest.json", '[]')):
        if source.is_dir():
            (source / name).write_text(text)
    flags = ["--activation", "tanh"] if kind == "nanogpt" else []
    assert main(["--from", kind, "--to", "huggingface", *flags, str(source), str(tmp_path / "out")]) == 2
    assert str(source) in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_allowed_names_are_stand_ins(tmp_path):
    """Loading calls nothing of theirs, though they are importable here."""
    import argparse
    import pathlib

    path = tmp_path / "a.pt"
    torch.save({"args": argparse.Namespace(x=1), "where": pathlib.PosixPath("/a")}, path)
    content = load_pickled(path)
    assert content["args"].x == 1
    for value in content.values():
        assert type(value).__module__ == "megagpt2.checkpoint.formats.pickles"
    assert not any(name.startswith(("os.", "posix.", "sys.", "subprocess.", "torch.load")) for name in NAMES)


def test_getattr_is_never_pythons(tmp_path):
    """What enumerations of Python 3.11.2 need of it, and no more."""

    class Attribute:
        def __reduce__(self):
            return getattr, (torch.Tensor, "numpy")

    torch.save({"a": Attribute()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="can't be opened as a file of tensors"):
        load_pickled(tmp_path / "a.pt")


def repacked(path: Path, change) -> None:
    """The archive with its records changed: change(name, data) -> (data, compression)."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            data, kind = change(name, data)
            archive.writestr(name, data, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: (data, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda name, data: (data[:40] if "/data/" in name else data, zipfile.ZIP_STORED), "which no record has"),
        (lambda name, data: (b"big" if "byteorder" in name else data, zipfile.ZIP_STORED), "big-endian"),
    ],
)
def test_mapped_tensors_are_what_was_saved(change, message, tmp_path):
    """torch maps compressed records, and records that are too short, as they are: what follows in the file."""
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    repacked(tmp_path / "a.pt", change)
    with pytest.raises(CheckpointError, match=message):
        load_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"x" * 100])
def test_what_is_no_archive_is_refused(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="can't be opened as a file of tensors"):
        load_pickled(tmp_path / "a.pt")


@pytest.mark.parametrize("at", range(0, 3000, 97))
def test_a_flipped_bit_of_openais_index_is_found(at, tmp_path):
    """All of it has checksums but the padding of its footer."""
    from megagpt2.checkpoint.formats.openai import read_index

    model = model_config(layers=1)
    index, _ = foreign.bundle({name: tensor.numpy() for name, tensor in foreign.parameters(model).items()})
    data = bytearray(index)
    place = at % (len(data) - 48)
    data[place] ^= 4
    (tmp_path / "x.index").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="index"):
        read_index(tmp_path / "x.index")
