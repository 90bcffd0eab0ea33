"""A checkpoint is whole and verified, or it isn't one (D6, I7); slices of any layout make whole tensors."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megagpt2.checkpoint import store
from megagpt2.checkpoint.disk import record_of, write_file
from megagpt2.checkpoint.formats import huggingface
from megagpt2.checkpoint.load import choose, open_checkpoint
from megagpt2.checkpoint.shards import INDEX, SliceReader, Slices, index_of, write_slices
from megagpt2.checkpoint.store import CheckpointError
from megagpt2.checkpoint.stream import TensorFile
from megagpt2.model.parameters import Extent, Spec
from megagpt2.parallel.tensor import TensorBuilder
from megagpt2.parallel.topology import Topology
from tests.support.models import dense_model, model_config, save_model

GRID = {"tensor": 1, "pipeline": 1, "data": 1}
FILES = {
    "state.json": "{}", "model/config.json": '{"a": 1}', "model/model.safetensors.index.json": '{"b": 1}',
    "optimizer/index.json": '{"c": 1}', "optimizer/rank_00000.safetensors": "x" * 5000,
}


def write_partial(checkpoints: Path, step: int) -> dict[str, dict]:
    """What a save does before its last step."""
    folder = store.begin(checkpoints, step)
    (folder / store.PARTS / "rank_00000.json").write_text("{}")
    return {name: write_file(folder / name, text.encode()) for name, text in FILES.items()}


def write(checkpoints: Path, *steps: int) -> list[Path]:
    return [store.commit(checkpoints, step, write_partial(checkpoints, step), GRID) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_files(folder: Path, name: str, record) -> None:
    files = json.loads((folder / store.MANIFEST).read_text())["files"]
    edit_manifest(folder, files=files | {name: record})


def test_a_committed_checkpoint_verifies_and_lists_every_file(tmp_path):
    (folder,) = write(tmp_path, 7)
    manifest = store.verify(folder)
    assert (folder.name, manifest.step, manifest.topology) == ("step_00000007", 7, GRID)
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == on_disk - {store.MANIFEST} == set(FILES)
    assert names(tmp_path) == [folder.name]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, the manifest says"),
        (Path.unlink, "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    ],
    ids=["flipped", "truncated", "longer", "missing", "folder"],
)
def test_damaged_files_are_named(file, damage, message, tmp_path):
    (folder,) = write(tmp_path, 7)
    damage(folder / file)
    with pytest.raises(CheckpointError, match=message) as caught:
        store.verify(folder)
    assert str(folder / file) in str(caught.value)


RECORD = {"size": 2, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / store.MANIFEST).unlink(), "does not exist: .* not a complete checkpoint"),
        (lambda f: (f / store.MANIFEST).write_text('{"version": 2, "st'), "can't be read"),
        (lambda f: (f / store.MANIFEST).write_bytes(b"\xff\xfe"), "can't be read"),
        (lambda f: (f / store.MANIFEST).write_text("[" * 100_000), "can't be read"),
        (lambda f: (f / store.MANIFEST).write_text("[1]"), "version None"),
        (lambda f: edit_manifest(f, version=store.VERSION + 1), "version 3, this program reads version 2"),
        (lambda f: (f / store.MANIFEST).write_text('{"version": 2, "step": 7, "topology": {}}'), "damaged.*files"),
        (lambda f: edit_manifest(f, files=["state.json"]), "damaged"),
        (lambda f: edit_files(f, "state.json", {"size": 2}), "damaged.*sha256"),
        (lambda f: edit_files(f, "state.json", None), "damaged"),
        (lambda f: edit_files(f, "../outside", RECORD), "'../outside', which lies outside"),
        (lambda f: edit_files(f, "model/../../outside", RECORD), "'model/../../outside', which lies outside"),
        (lambda f: edit_files(f, "/etc/passwd", RECORD), "'/etc/passwd', which lies outside"),
        (lambda f: edit_files(f, "./state.json", RECORD), "'./state.json', which is no plain path"),
        (lambda f: edit_files(f, "model//config.json", RECORD), "'model//config.json', which is no plain path"),
        (lambda f: edit_files(f, "", RECORD), "'', which is no plain path"),
        (lambda f: edit_manifest(f, files={}), "does not list state.json, which every checkpoint has"),
    ],
)
def test_damaged_manifests_are_named(damage, message, tmp_path):
    (tmp_path / "outside").write_text("{}")
    older, folder = write(tmp_path / "checkpoints", 3, 7)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        store.verify(folder)
    assert str(folder / store.MANIFEST) in str(caught.value)
    newest, skipped = store.newest_verified(tmp_path / "checkpoints")
    assert newest == older and len(skipped) == 1  # whatever the damage, the older one is found


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/pytorch_model.bin", "optimizer/more/rank_9.pt"])
def test_weights_that_were_not_written_are_not_taken_for_what_was(name, tmp_path):
    """transformers opens model.safetensors before the index's files. What nobody opens may lie there."""
    older, folder = write(tmp_path, 3, 7)
    for other in ("README.md", "model/README.md"):
        (folder / other).write_text("a note")
    store.verify(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        store.verify(folder)
    assert store.newest_verified(tmp_path)[0] == older


def test_newest_verified_falls_back_and_says_why(tmp_path):
    folders = write(tmp_path, 9, 10, 100, 12)
    flip(folders[2] / "state.json")
    (folders[3] / "model/config.json").unlink()
    newest, skipped = store.newest_verified(tmp_path)
    assert newest == folders[1]  # by number: step 10 is newer than 9
    assert [line.split(":")[0] for line in skipped] == ["step_00000100", "step_00000012"]
    assert "state.json" in skipped[0] and "config.json is missing" in skipped[1]
    assert store.newest_verified(tmp_path / "nowhere") == (None, [])


def test_foreign_names_are_no_checkpoints(tmp_path):
    (folder,) = write(tmp_path, 5)
    for name in ("step_7", "step_00000009.bak", "old_step_00000009", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000011").write_text("a file")
    assert store.all_steps(tmp_path) == [folder]


@pytest.mark.parametrize("next_step", [200, 300])
def test_an_interrupted_save_is_ignored_and_then_removed(next_step, tmp_path):
    """Also when the run never comes by the same step again, as after a save on a signal."""
    (whole,) = write(tmp_path, 100)
    write_partial(tmp_path, 200)
    (tmp_path / ".step_00000050.removing").mkdir()
    (tmp_path / ".step_00000060.partial").write_text("a file")
    (tmp_path / ".step_00000070.partial").symlink_to("/")
    assert store.newest_verified(tmp_path) == (whole, [])
    (following,) = write(tmp_path, next_step)
    assert names(tmp_path) == [whole.name, following.name]
    store.verify(following)


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    (folder,) = write(tmp_path, 200)
    flip(folder / "state.json")
    (folder / "stray").write_text("")
    write(tmp_path, 200)
    store.verify(folder)
    assert "stray" not in names(folder)


def test_prune_keeps_the_newest(tmp_path):
    folders = write(tmp_path, 9, 10, 100, 1000)
    assert store.superfluous(tmp_path, folders[-1], 5) == []
    assert store.superfluous(tmp_path, folders[-1], 1, keep_every=10) == folders[:1]
    assert store.superfluous(tmp_path, folders[-1], 2) == folders[:2]
    store.remove(folders[0])
    assert names(tmp_path) == [folder.name for folder in folders[1:]]
    assert all(store.verify(folder) for folder in folders[1:])


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    folders = write(tmp_path, 1, 2, 3, 4, 5)
    (folders[3] / "state.json").unlink()
    flip(folders[2] / "state.json")  # of the same size
    assert store.superfluous(tmp_path, folders[4], 2) == folders[:2]
    assert store.superfluous(tmp_path, folders[4], 2, verify=store.verify) == folders[:1]


def test_prune_never_takes_what_was_just_saved_for_folders_of_later_steps(tmp_path):
    """A run that fell back below damaged folders, or began anew, saves steps that are not the highest."""
    folders = write(tmp_path, 1, 2, 3, 100, 200)
    assert store.superfluous(tmp_path, folders[2], 1) == folders[:2]
    assert folders[2].is_dir()


def test_choose_auto(tmp_path):
    assert choose("auto", tmp_path / "checkpoints") == (None, [])
    folders = write(tmp_path, 1, 2)
    assert choose("auto", tmp_path) == (folders[1], [])
    flip(folders[1] / "state.json")
    folder, notes = choose("auto", tmp_path)
    assert folder == folders[0] and "step_00000002" in notes[0] and "state.json" in notes[0]
    flip(folders[0] / "state.json")
    with pytest.raises(CheckpointError, match="no checkpoint can be used.*step_00000002.*step_00000001.*another run"):
        choose("auto", tmp_path)  # to begin anew beside damaged checkpoints would throw a run away


def test_choose_must(tmp_path):
    with pytest.raises(CheckpointError, match="'must'.*holds none"):
        choose("must", tmp_path)
    (folder,) = write(tmp_path, 1)
    assert choose("must", tmp_path) == (folder, [])


def test_choose_never(tmp_path):
    assert choose("never", tmp_path) == (None, [])
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="'never'.*step_00000001 of an earlier run: use another run.directory"):
        choose("never", tmp_path)  # the next resume would take the earlier run's later steps


def test_a_run_that_began_elsewhere_goes_on_from_its_own(tmp_path):
    """The same command, started again by a scheduler, must not throw away what it trained since."""
    (origin,) = write(tmp_path / "origin", 7)
    assert choose(str(origin), tmp_path / "run") == (origin, [])
    (own,) = write(tmp_path / "run", 2)
    folder, notes = choose(str(origin), tmp_path / "run")
    assert folder == own and "of its own" in notes[0]
    shutil.rmtree(origin)  # which is not needed any more
    assert choose(str(origin), tmp_path / "run")[0] == own
    flip(own / "state.json")
    write(tmp_path / "origin", 7)
    with pytest.raises(CheckpointError, match=r"checkpoints of its own, and none can be used: step_00000002: .*state"):
        choose(str(origin), tmp_path / "run")


def test_choose_a_path(tmp_path):
    folders = write(tmp_path, 1, 2)
    assert choose(str(folders[0]), tmp_path / "run") == (folders[0], [])  # not the newest: the one that was named
    with pytest.raises(CheckpointError, match="goes back to .*step_00000001.*holds step_00000002"):
        choose(str(folders[0]), tmp_path)  # of this very run: its later steps would be resumed next
    assert choose(str(folders[1]), tmp_path) == (folders[1], [])
    (tmp_path / "latest").symlink_to(folders[1].name)
    assert choose(str(tmp_path / "latest"), tmp_path) == (tmp_path / "latest", [])
    with pytest.raises(CheckpointError, match="step_00000003, which is not a folder"):
        choose(str(tmp_path / "step_00000003"), tmp_path)
    flip(folders[0] / "state.json")
    with pytest.raises(CheckpointError, match="state.json has changed"):
        choose(str(folders[0]), tmp_path)  # and no other is taken in its place
    with pytest.raises(CheckpointError, match="manifest.json does not exist"):
        choose(str(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    config = model_config()
    return save_model(dense_model(config), config, tmp_path_factory.mktemp("checkpoints"), step=3)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def test_a_saved_model_comes_back_bit_by_bit(saved):
    store.verify(saved)
    config = model_config()
    loaded = open_checkpoint(saved, config)
    assert (loaded.state.step, loaded.state.samples_seen, loaded.state.updates) == (3, 24, 3)
    for parameter in dense_model(config).parameters():
        whole = Extent.whole(parameter.spec)  # padding rows never leave, and come back as zeros
        expected = parameter.spec.local(parameter.detach()[: parameter.spec.shape[0]]).flatten()
        assert torch.equal(loaded.weight(whole, torch.float32), expected), parameter.spec.name
        assert torch.equal(loaded.state_of("master", whole), expected), parameter.spec.name


@pytest.mark.parametrize(
    "change",
    [{"layers": 3}, {"width": 27}, {"heads": 2}, {"vocabulary": 302}, {"norm": "post"}, {"layer_norm_epsilon": 0.001}],
)
def test_another_model_is_refused(change, saved):
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} .* asks for {next(iter(change.values()))}"):
        open_checkpoint(saved, model_config(**change))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "deeper/model.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(file, copy):
    path = copy / "model" / huggingface.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"index.json names the file '{file}'"):
        huggingface.Weights(copy / "model", model_config())


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(text, copy):
    (copy / "model" / huggingface.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index.json is not an index"):
        huggingface.Weights(copy / "model", model_config())


def test_damaged_and_missing_weights_are_named(copy):
    spec = next(dense_model(model_config()).parameters()).spec
    weights = huggingface.Weights(copy / "model", model_config())
    (file,) = (copy / "model").glob("*.safetensors")
    file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=file.name):
        weights.read(spec)
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        weights.read(spec)
    with pytest.raises(CheckpointError, match="no tensor transformer.extra"):
        weights.read(Spec("extra", (1,)))


# Slices. A layout is a number of tensor-parallel shards, each flattened and cut somewhere over the replicas.

LAYERS = {
    "c_attn": lambda build: build.column_linear("c_attn", 3, parts=3, units=5, unit=2, std=0.02),
    "c_proj": lambda build: build.row_linear("c_proj", 4, units=5, unit=2, std=0.02),
    "wte": lambda build: build.tied_embedding("wte", 21, 32, 2, 0.02),
    "ln": lambda build: build.layer_norm("ln", 6, 1e-5),
}


def specs_of(shard: int, shards: int) -> list[Spec]:
    with torch.device("meta"):
        build = TensorBuilder(0, Topology(tensor=shards, rank=shard), False)
        return [parameter.spec for make in LAYERS.values() for parameter in make(build).parameters()]


def whole_tensors(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(kind))
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in specs_of(0, 1)}


KINDS = {kind: whole_tensors(kind) for kind in ("master", "exp_avg")}


@st.composite
def layouts(draw) -> list[list[tuple[Spec, int, int]]]:
    """[rank][slice]: (spec, start, stop), as ZeRO could cut: anywhere, some ranks with nothing of a parameter."""
    shards, replicas = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    ranks: list[list[tuple[Spec, int, int]]] = [[] for _ in range(shards * replicas)]
    for shard in range(shards):
        for spec in specs_of(shard, shards):
            size = torch.Size(spec.local_shape).numel()
            cuts = sorted(draw(st.lists(st.integers(0, size), min_size=replicas - 1, max_size=replicas - 1)))
            for replica, (start, stop) in enumerate(zip([0, *cuts], [*cuts, size], strict=True)):
                if stop > start:
                    ranks[replica * shards + shard].append((spec, start, stop))
    return draw(st.permutations(ranks))


def write_layout(folder: Path, layout: list[list[tuple[Spec, int, int]]]) -> None:
    notes = []
    for rank, slices in enumerate(layout):
        path = folder / f"rank_{rank:05d}.safetensors"
        values = [
            {kind: spec.local(whole[spec.name]).flatten()[start:stop] for kind, whole in KINDS.items()}
            for spec, start, stop in slices
        ]
        record, note = write_slices(path, Slices(tuple(KINDS), [Extent(*place) for place in slices], values))
        assert record == (record_of(path) if slices else None)
        notes.append(note)
    (folder / INDEX).write_text(json.dumps(index_of(notes)))


@given(layouts(), st.integers(1, 6), st.data())
@settings(max_examples=30)
def test_slices_of_any_layout_are_read_on_any_other(layout, shards, data):
    shard = data.draw(st.integers(0, shards - 1))
    with tempfile.TemporaryDirectory() as folder:
        write_layout(Path(folder), layout)
        reader = SliceReader(Path(folder))
        assert reader.kinds == set(KINDS)
        for kind, whole in KINDS.items():
            for spec in specs_of(shard, shards):
                local = spec.local(whole[spec.name])
                assert torch.equal(reader.read(kind, spec), local), (kind, spec.name)
                start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, local.numel())])))
                before = reader.bytes_read
                piece = reader.piece(kind, Extent(spec, start, stop))
                assert torch.equal(piece, local.flatten()[start:stop]), (kind, spec.name, start, stop)
                assert reader.bytes_read - before <= 4 * sum(len(layout) * [stop - start])


@given(layouts(), st.data())
@settings(max_examples=30)
def test_a_missing_slice_is_named(layout, data):
    def elements(spec: Spec, start: int, stop: int) -> int:
        """How many of a slice's elements are not padding, nor held by another shard as well."""
        if not spec.sharded:
            return (stop - start) * (sum((spec.name == other.name) for part in layout for other, *_ in part) == 1)
        real = torch.Size((spec.local_shape[0] - spec.padding, *spec.local_shape[1:])).numel()
        return min(stop, real) - start

    candidates = [(rank, n) for rank, part in enumerate(layout) for n, one in enumerate(part) if elements(*one) > 0]
    rank, number = data.draw(st.sampled_from(candidates))
    spec, *_ = layout[rank].pop(number)
    with tempfile.TemporaryDirectory() as folder:
        write_layout(Path(folder), layout)
        with pytest.raises(CheckpointError, match=f"{spec.name}"):
            SliceReader(Path(folder)).read("master", Spec(spec.name, spec.shape))


def test_absent_state_is_named(tmp_path):
    spec = specs_of(0, 1)[0]
    with pytest.raises(CheckpointError, match="holds no optimizer state"):
        SliceReader(tmp_path)
    zeros = {"master": torch.zeros(spec.shape).flatten()}
    _, note = write_slices(tmp_path / "rank_00000.safetensors", Slices(("master",), [Extent.whole(spec)], [zeros]))
    (tmp_path / INDEX).write_text(json.dumps(index_of([note])))
    reader = SliceReader(tmp_path)
    with pytest.raises(CheckpointError, match="has no exp_avg, only master"):
        reader.read("exp_avg", spec)  # the run was an SGD's
    with pytest.raises(CheckpointError, match="no state of other"):
        reader.read("master", Spec("other", (3,)))
    with pytest.raises(CheckpointError, match=r"shape \[30, 3\], the model \[30, 4\]"):
        reader.read("master", Spec(spec.name, (30, 4)))
    (tmp_path / "rank_00000.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="rank_00000.safetensors is not a readable safetensors file"):
        SliceReader(tmp_path).read("master", spec)


def test_streamed_files_are_what_the_library_reads(tmp_path):
    """Types, shapes, a view that is not contiguous, and an empty tensor."""
    tensors = {
        "a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "view": torch.randn(4, 6).T, "none": torch.empty(0),
        "c": torch.randn(2, 3, 4).half(),
    }
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFile(tmp_path / "x.safetensors", entries, {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_streamed_file_holds_what_was_announced(tmp_path):
    entries = [("a", torch.float32, (2,)), ("b", torch.float32, (2,))]
    with pytest.raises(ValueError, match="b .* was added, .*'a'"), TensorFile(tmp_path / "x", entries, {}) as file:
        file.add("b", torch.zeros(2))
    with pytest.raises(ValueError, match="b was not added"), TensorFile(tmp_path / "x", entries, {}) as file:
        file.add("a", torch.zeros(2))
