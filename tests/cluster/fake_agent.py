"""An agent whose rank has no model."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_medha.cluster.remote.agent import attach

if __name__ == "__main__":
    sys.exit(attach(sys.argv[1:], (sys.executable, str(Path(__file__).with_name("fake_rank.py")))))
