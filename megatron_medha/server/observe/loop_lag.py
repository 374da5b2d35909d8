"""How late the event loop runs what is due: what each request may wait for the work of others."""

from __future__ import annotations

import asyncio
import time

from megatron_medha.server.observe.metrics import Metrics

INTERVAL_S = 0.02


async def measure_loop_lag(metrics: Metrics) -> None:
    """Measure it until cancelled.

    Counted as far as this process has computed meanwhile: on a busy machine a process also waits for a core.
    """
    loop = asyncio.get_running_loop()
    while True:
        due_s, computed_s = loop.time() + INTERVAL_S, time.process_time()
        await asyncio.sleep(INTERVAL_S)
        lag_s = max(0.0, min(loop.time() - due_s, time.process_time() - computed_s))
        metrics.loop_lag_s.observe(lag_s)
        metrics.recent_lags_s.append(lag_s)
