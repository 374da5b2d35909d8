"""`python -m megatron_medha` is `medha`."""

from __future__ import annotations

import sys

from megatron_medha.cli.medha import main

sys.exit(main())
