"""What processes that we start find in their environment."""

from __future__ import annotations

from megatron_medha.system.secret_values import child_environment

SECRET = {
    "MEDHA_API_KEY": "sk-1", "MEDHA_ADMIN_KEY": "sk-2", "HF_TOKEN": "hf_1", "WANDB_API_KEY": "w",
    "OPENAI_API_KEY": "sk-3",
    "AWS_SECRET_ACCESS_KEY": "a", "AWS_SESSION_TOKEN": "b", "PGPASSWORD_FILE_PASSWORD": "c", "DB_PASSWORD": "d",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer x", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x=y",
    "HTTPS_PROXY": "http://user:password@proxy:3128", "my_api_key": "e",
}  # fmt: skip
PLAIN = {
    "PATH": "/usr/bin", "HOME": "/root", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0,1",
    "NCCL_IB_PKEY": "0", "LD_LIBRARY_PATH": "/usr/lib", "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "MAX_TOKENS": "5",
    "HTTP_PROXY": "http://proxy:3128", "PYTHONPATH": ".", "KEYBOARD": "us",
}  # fmt: skip


def test_secrets_are_left_out_and_everything_else_stays() -> None:
    assert child_environment((), {**SECRET, **PLAIN}) == PLAIN


def test_values_known_to_be_secret_are_left_out_whatever_their_name_is() -> None:
    environment = {"MINE": "sk-12345678", "CONFIG": "--api sk-12345678 --x", "N": "8"}
    assert child_environment(["sk-12345678", "8"], {**environment, **PLAIN}) == {"N": "8", **PLAIN}
