"""Writes files of checkpoints that would run code, change the process, hang the load or fill the memory if they could.

MEGATRON, HUGGING_FACE and TOKENIZER have, by the name of a case, the function that spoils the directory of a sound
checkpoint, and what the refusal must name.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Spoil = Callable[[Path], object]


def step_of(directory: Path) -> Path:
    return next(directory.glob("iter_*"))


def text(value: str) -> bytes:
    """The opcode that pushes it."""
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def found(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def sets_attribute(module: str, name: str, attribute: str, value: bytes) -> bytes:
    """BUILD on the class or function itself: its attribute is set, where pickle has its way."""
    state = pickle.NONE + pickle.EMPTY_DICT + pickle.MARK + text(attribute) + value + pickle.SETITEMS + pickle.TUPLE2
    return b"\x80\x02" + found(module, name) + state + pickle.BUILD + b"."


def calls(module: str, name: str, *args: bytes) -> bytes:
    return b"\x80\x02" + found(module, name) + pickle.MARK + b"".join(args) + pickle.TUPLE + pickle.REDUCE + b"."


def doubled(times: int, make: bytes, is_key: bool = False) -> bytes:
    """[[...], [...]] of the same two parts, again and again: small in memory, endless to print, compare or hash."""
    begin = b"\x80\x02" + (pickle.EMPTY_DICT if is_key else b"")
    body = pickle.NONE + (pickle.DUP + make) * times
    return begin + body + (pickle.NONE + pickle.SETITEM if is_key else b"") + b"."


def archive(data: bytes, *, compression: int = zipfile.ZIP_STORED, entries: dict[str, bytes] | None = None) -> bytes:
    """What torch.save writes, of that pickle."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **(entries or {})}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """An archive of one float tensor whose storage has 4 elements in the file."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing: Any) -> Any:
            if isinstance(thing, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", numel)
            return None

    class Saved:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    import io

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"args": Saved()})
    return archive(buffer.getvalue(), entries={"data/0": bytes(16)})


def common(content: bytes) -> Spoil:
    """A Megatron checkpoint whose common.pt is that."""
    return lambda directory: (step_of(directory) / "common.pt").write_bytes(content)


def common_pickle(data: bytes) -> Spoil:
    return common(archive(data))


def index(content: bytes) -> Spoil:
    """A Megatron checkpoint whose .metadata is that."""
    return lambda directory: (step_of(directory) / ".metadata").write_bytes(content)


def fifo(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        path = next(iter(directory.rglob(name)), directory / name)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return spoil


def link_to(name: str, target: str) -> Spoil:
    def spoil(directory: Path) -> None:
        path = next(iter(directory.rglob(name)), directory / name)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return spoil


def content(name: str, data: str | bytes) -> Spoil:
    def spoil(directory: Path) -> None:
        path = next(iter(directory.rglob(name)), directory / name)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def edited(name: str, **changes: Any) -> Spoil:
    """A JSON file with other values."""

    def spoil(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def with_args(**changes: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = step_of(directory) / "common.pt"
        saved = torch.load(path, weights_only=False)
        vars(saved["args"]).update(changes)
        torch.save(saved, path)

    return spoil


def with_metadata(change: Callable[[Any], None]) -> Spoil:
    def spoil(directory: Path) -> None:
        path = step_of(directory) / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return spoil


def compiled_program(directory: Path) -> None:
    """A TorchScript archive that writes a file as it is loaded; its own __setstate__ runs in torch.load."""
    import warnings

    target = directory / "written by TorchScript"

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = str(target)

        @torch.jit.export
        def __getstate__(self):  # type: ignore[no-untyped-def]
            return (self.path, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):  # type: ignore[no-untyped-def]
            self.path = state[0]
            self.training = state[1]
            torch.save(torch.arange(4), state[0])

        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.inner(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Outer()).save(str(step_of(directory) / "common.pt"))
    target.unlink(missing_ok=True)


def program_as_data(directory: Path) -> None:
    """The same in place of the data files."""
    compiled_program(directory)
    made = (step_of(directory) / "common.pt").read_bytes()
    good = directory.with_name("sound megatron")
    (step_of(directory) / "common.pt").write_bytes((step_of(good) / "common.pt").read_bytes())
    for path in step_of(directory).glob("*.distcp"):
        path.write_bytes(made + bytes(1 << 20))
    with_metadata(lambda metadata: [vars(info).update(offset=0, length=len(made))
                                    for info in metadata.storage_data.values()])(directory)  # fmt: skip


def many_layers_of_nothing(metadata: Any) -> None:
    for stored in metadata.state_dict_metadata.values():
        stored.size = torch.Size([10**9, *stored.size[1:]])
        for chunk in stored.chunks:
            chunk.sizes = torch.Size([10**9, *chunk.sizes[1:]])


def safetensors(header: bytes, num_bytes: int | None = None) -> Spoil:
    return content("model.safetensors", struct.pack("<Q", len(header) if num_bytes is None else num_bytes) + header)


DEEP_JSON = "[" * 200_000 + "]" * 200_000
MANY_SAME_HASH = b"\x80\x02" + pickle.EMPTY_DICT + b"".join(
    pickle.LONG1 + bytes([10]) + (k * (2**61 - 1)).to_bytes(10, "little") + pickle.NONE + pickle.SETITEM
    for k in range(1, 120_000)
) + b"."  # fmt: skip

MEGATRON: dict[str, tuple[Spoil, str]] = {
    "a TorchScript program": (compiled_program, "common.pt"),
    "a TorchScript program as data": (program_as_data, ".distcp"),
    "attributes of a class": (common_pickle(sets_attribute("argparse", "Namespace", "hacked", pickle.NEWTRUE)),
                              "common.pt"),
    "defaults of a function": (
        common_pickle(sets_attribute("torch._utils", "_rebuild_tensor_v2", "__defaults__", pickle.EMPTY_TUPLE)),
        "common.pt"),
    "methods of a class": (common_pickle(sets_attribute("pathlib", "PosixPath", "is_file", found("io", "BytesIO"))),
                           "common.pt"),
    "attributes of a record's class": (
        index(sets_attribute("torch.distributed.checkpoint.metadata", "Metadata", "hacked", pickle.NEWTRUE)),
        ".metadata"),
    "attributes of a class in the index": (index(sets_attribute("argparse", "Namespace", "hacked", pickle.NEWTRUE)),
                                           ".metadata"),
    "attributes of a function in the index": (
        index(sets_attribute("torch.serialization", "_get_layout", "__code__", pickle.NONE)), ".metadata"),
    "a shell in the index": (index(calls("os", "system", text("touch 'written by a shell'"))), ".metadata"),
    "a huge bytearray": (common_pickle(calls("builtins", "bytearray", b"\x8a\x08" + struct.pack("<q", 1 << 35))),
                         "common.pt"),
    "a huge memo": (common_pickle(b"\x80\x02N" + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 2) + b"."),
                    "common.pt"),
    "a huge memo in the index": (index(b"\x80\x02N" + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 2) + b"."),
                                 ".metadata"),
    "millions of marks": (common_pickle(b"\x80\x02" + pickle.MARK * 15_000_000 + b"."), "common.pt"),
    "millions of memos": (common_pickle(b"\x80\x04N" + pickle.MEMOIZE * 15_000_000 + b"."), "common.pt"),
    "a tracker of many digits": (content("latest_checkpointed_iteration.txt", "1" * 4000),
                                 "latest_checkpointed_iteration.txt"),
    "data in a file of a long name": (
        with_metadata(lambda m: [vars(i).update(relative_path="x" * 5000) for i in m.storage_data.values()]),
        ".metadata"),
    "pieces of no dimension": (
        with_metadata(lambda m: [vars(chunk).update(sizes=torch.Size(())) for stored in m.state_dict_metadata.values()
                                 for chunk in stored.chunks]), ".metadata"),
    "pieces that share their bytes": (
        with_metadata(lambda m: [vars(i).update(relative_path="__0_0.distcp", offset=0, length=3000)
                                 for i in m.storage_data.values()]), ".metadata"),
    "a huge string": (common_pickle(b"\x80\x04" + pickle.BINUNICODE8 + struct.pack("<Q", 2**62) + b"x."), "common.pt"),
    "a huge bytearray of its own opcode": (
        common_pickle(b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", 2**36) + b"x."), "common.pt"),
    "a set of doubled tuples": (
        common_pickle(b"\x80\x04" + pickle.EMPTY_SET + pickle.MARK + pickle.NONE + (pickle.DUP + pickle.TUPLE2) * 80
                      + pickle.ADDITEMS + b"."), "common.pt"),
    "a registered extension": (common_pickle(b"\x80\x02" + pickle.EXT1 + b"\x01."), "common.pt"),
    "an old instance of a shell": (
        common_pickle(pickle.MARK + text("touch 'written by a shell'") + b"ios\nsystem\n."), "common.pt"),
    "a huge frame": (common_pickle(b"\x80\x04" + pickle.FRAME + struct.pack("<Q", 2**36) + b"N."), "common.pt"),
    "tuples that double": (common_pickle(doubled(80, pickle.TUPLE2)), "common.pt"),
    "tuples that double as a key": (common_pickle(doubled(80, pickle.TUPLE2, is_key=True)), "common.pt"),
    "tuples that double as a key of the index": (index(doubled(80, pickle.TUPLE2, is_key=True)), ".metadata"),
    "keys of one hash": (common_pickle(MANY_SAME_HASH), "common.pt"),
    "a list in itself": (common_pickle(b"\x80\x02]q\x00h\x00a."), "common.pt"),
    "tuples in tuples": (common_pickle(b"\x80\x02N" + pickle.TUPLE1 * 300_000 + b"."), "common.pt"),
    "a tensor of nothing": (common(tensor(4, 0, (2**40,), (0,))), "common.pt"),
    "a tensor beyond its storage": (common(tensor(4, 0, (2, 2), (2**20, 1))), "common.pt"),
    "a storage beyond its entry": (common(tensor(2**34, 0, (2**34,), (1,))), "common.pt"),
    "a tensor before its storage": (common(tensor(4, -8, (2,), (1,))), "common.pt"),
    "millions of lists in a small archive": (
        lambda directory: common(archive(pickle.EMPTY_LIST * (64 << 20),
                                         compression=zipfile.ZIP_DEFLATED))(directory), "common.pt"),
    "an old archive": (lambda directory: torch.save({"args": 1}, step_of(directory) / "common.pt",
                                                    _use_new_zipfile_serialization=False), "common.pt"),
    "a pipe as common.pt": (fifo("common.pt"), "common.pt"),
    "a pipe as index": (fifo(".metadata"), ".metadata"),
    "a pipe as data": (fifo("__0_0.distcp"), "__0_0.distcp"),
    "a device as index": (link_to(".metadata", "/dev/zero"), ".metadata"),
    "a device as tracker": (link_to("latest_checkpointed_iteration.txt", "/dev/zero"),
                            "no checkpoint found"),
    "deep JSON": (content("metadata.json", DEEP_JSON), "metadata.json"),
    "data outside of the directory": (
        with_metadata(lambda m: [vars(i).update(relative_path="../../../../etc/passwd", offset=0, length=8)
                                 for i in m.storage_data.values()]), ".metadata"),
    "data at an absolute path": (
        with_metadata(lambda m: [vars(i).update(relative_path="/proc/self/mem", offset=0, length=8)
                                 for i in m.storage_data.values()]), ".metadata"),
    "pieces of a negative length": (
        with_metadata(lambda m: [vars(i).update(length=-1) for i in m.storage_data.values()]), ".metadata"),
    "a context of 30 digits in Megatron": (with_args(max_position_embeddings=10**30), "common.pt"),
    "a billion layers": (with_args(num_layers=10**9), "common.pt"),
    "long values": (with_args(num_layers="9" * 1_000_000, normalization=[["x" * 1000] * 1000]), "common.pt"),
    "a hundred thousand unknown arguments": (
        with_args(**{f"argument_{number}": 1 for number in range(100_000)}), "common.pt"),
    "an argument with a long name": (with_args(**{"x" * 1_000_000: 1}), "common.pt"),
    "a huge hidden size": (with_args(hidden_size=2**40, kv_channels=2**38), "common.pt"),
    "a billion layers of nothing": (
        lambda directory: (with_args(num_layers=10**9)(directory),
                           with_metadata(many_layers_of_nothing)(directory)), ".metadata"),
}  # fmt: skip

HUGGING_FACE: dict[str, tuple[Spoil, str]] = {
    "a billion layers of transformers": (edited("config.json", num_hidden_layers=10**9), "config.json"),
    "a huge hidden size of transformers": (edited("config.json", hidden_size=2**40, head_dim=2**38), "config.json"),
    "a huge vocabulary": (edited("config.json", vocab_size=10**15), "config.json"),
    "a context of 30 digits": (edited("config.json", max_position_embeddings=10**30), "config.json"),
    "many heads": (edited("config.json", num_attention_heads=2**40, num_key_value_heads=2**40), "config.json"),
    "a long value of a config": (edited("config.json", hidden_size="9" * 1_000_000), "config.json"),
    "a value of a config that is large": (edited("config.json", model_type=[["x"] * 1000] * 300), "config.json"),
    "a hundred thousand unknown fields": (
        edited("config.json", **{f"field_{number}": 1 for number in range(100_000)}), "config.json"),
    "a field with a long name": (edited("config.json", **{"x" * 1_000_000: 1}), "config.json"),
    "deep JSON of a config": (content("config.json", '{"model_type": ' + DEEP_JSON + "}"), "config.json"),
    "deep JSON beside the config": (content("generation_config.json", '{"a": ' + DEEP_JSON + "}"),
                                    "generation_config.json"),
    "a long number": (content("config.json", '{"hidden_size": ' + "9" * 1_000_000 + "}"), "config.json"),
    "a large config": (content("config.json", '{"a": [' + "[]," * 20_000_000 + "0]}"), "config.json"),
    "a pipe as config": (fifo("config.json"), "no checkpoint found"),
    "a pipe as weights": (
        lambda directory: ((directory / "model.safetensors").unlink(), os.mkfifo(directory / "a.safetensors")),
        "a.safetensors"),
    "a device that has nothing to read": (link_to("generation_config.json", "/proc/kmsg"), "generation_config.json"),
    "memory as weights": (link_to("model.safetensors", "/proc/self/mem"), "model.safetensors"),
    "a number of architectures": (edited("config.json", architectures=1), "config.json"),
    "a million lists": (content("generation_config.json", '{"a": [' + "[]," * 1_000_000 + "0]}"),
                        "generation_config.json"),
    "a device as generation config": (link_to("generation_config.json", "/dev/zero"), ""),
    "a huge header": (safetensors(b"{}", 1 << 62), "model.safetensors"),
    "a header cut short": (safetensors(b"{}", 90_000_000), "model.safetensors"),
    "tensors that overlap": (
        safetensors(json.dumps({f"model.layers.{i}.mlp.up_proj.weight":
                                {"dtype": "F32", "shape": [2**20, 2**10], "data_offsets": [0, 4]}
                                for i in range(100)}).encode() + b"abcd"), "model.safetensors"),
    "a shape whose product overflows": (
        safetensors(json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**32, 2**32],
                                                      "data_offsets": [0, 0]}}).encode()), "model.safetensors"),
    "weights outside of the directory": (
        lambda directory: ((directory / "model.safetensors").unlink(),
                           (directory / "model.safetensors.index.json").write_text(
                               json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}))),
        "model.safetensors.index.json"),
    "weights at an absolute path": (
        lambda directory: ((directory / "model.safetensors").unlink(),
                           (directory / "model.safetensors.index.json").write_text(
                               json.dumps({"weight_map": {"model.norm.weight": "/dev/stdin"}}))),
        "model.safetensors.index.json"),
    "deep JSON of an index": (
        lambda directory: (
            (directory / "model.safetensors").unlink(),
            (directory / "model.safetensors.index.json").write_text('{"weight_map": ' + DEEP_JSON + "}")),
        "model.safetensors.index.json"),
}  # fmt: skip


def pipeline(section: str, **step: Any) -> Spoil:
    """A tokenizer with that one step."""
    return edited("tokenizer.json", **{section: step})


def split(pattern: str) -> Spoil:
    return pipeline("pre_tokenizer", type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)


TOKENIZER: dict[str, tuple[Spoil, str]] = {
    "a pattern that never ends": (split("(a+)+$"), "tokenizer.json"),
    "another pattern that never ends": (split("(1|11)+x"), "tokenizer.json"),
    "a long pattern": (split("|".join(f"a{number}" for number in range(20_000))), "tokenizer.json"),
    "a pattern of many parentheses": (split("(" * 10_000 + "a" + ")" * 10_000), "tokenizer.json"),
    "a table of gigabytes": (pipeline("normalizer", type="Precompiled", precompiled_charsmap="/////w=="),
                             "tokenizer.json"),
    "a table of nothing": (pipeline("normalizer", type="Precompiled", precompiled_charsmap="BAAAAAEAAAAA"),
                           "tokenizer.json"),
    "megabytes for each letter": (
        pipeline("normalizer", type="Replace", pattern={"String": "l"}, content="l" * 30_000_000), "tokenizer.json"),
    "text between all letters": (
        pipeline("normalizer", type="Replace", pattern={"String": ""}, content="x"), "tokenizer.json"),
    "millions of special tokens": (
        pipeline("post_processor", type="TemplateProcessing",
                 single=[{"SpecialToken": {"id": "q", "type_id": 0}}] * 50_000,
                 pair=[], special_tokens={"q": {"id": "q", "ids": list(range(1000)), "tokens": ["x"] * 1000}}),
        "tokenizer.json"),
    "deep JSON of a tokenizer": (content("tokenizer.json", '{"model": ' + DEEP_JSON + "}"), "tokenizer.json"),
    "deep JSON of a normalizer": (content("tokenizer.json", '{"normalizer": ' + DEEP_JSON + "}"), "tokenizer.json"),
    "deep JSON of a tokenizer's config": (content("tokenizer_config.json", '{"a": ' + DEEP_JSON + "}"),
                                          "tokenizer_config.json"),
    "a list of tokens that is none": (edited("tokenizer_config.json", additional_special_tokens=5,
                                             extra_special_tokens=[[["x"]]]), "tokenizer_config.json"),
    "a token whose id is long": (edited("tokenizer_config.json", added_tokens_decoder={"9" * 5000: "x"}),
                                 "tokenizer_config.json"),
    "a token that is half a character": (
        lambda directory: (directory / "tokenizer_config.json").write_text('{"pad_token": "\\ud800"}'),
        "tokenizer_config.json"),
    "a template whose name is a list": (
        edited("tokenizer_config.json", chat_template=[{"name": ["default"], "template": "x"}]), ""),
    "a long version": (edited("tokenizer.json", version="x" * 100_000), "tokenizer.json"),
    "a pipe as tokenizer": (fifo("tokenizer.json"), "tokenizer.json"),
    "a device as tokenizer": (link_to("tokenizer.json", "/dev/zero"), "tokenizer.json"),
    "a large template": (content("chat_template.jinja", "x" * (64 << 20)), "chat_template.jinja"),
    "a device as special tokens": (link_to("special_tokens_map.json", "/dev/zero"), ""),
}  # fmt: skip
