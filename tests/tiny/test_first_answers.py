"""The real first model against transformers: run where the Python index has it, skipped with the reason elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs the gguf package: pip install 'megatron_medha[gguf]'")
pytest.importorskip("transformers")
from experiments.first_model.greedy_texts import QUESTIONS, of_transformers, served  # noqa: E402
from megatron_medha.cli.parts.served import server_process  # noqa: E402
from megatron_medha.tiny.first_model import FetchConfig, FetchError, fetch_model  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_texts_of_the_first_model_are_those_of_transformers(tmp_path: Path) -> None:
    checkpoint = tmp_path / "smollm2"
    try:
        fetch_model(checkpoint, FetchConfig(dtype="float32", keep_gguf=True))
    except FetchError as error:
        pytest.skip(str(error))
    [gguf] = checkpoint.glob("*.gguf")
    theirs = of_transformers(gguf)
    with server_process([f"checkpoint={checkpoint}"], tmp_path / "server.log") as url:
        ours = served(url)
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]
    assert "Paris" in ours[QUESTIONS.index("What is the capital of France?")].text
